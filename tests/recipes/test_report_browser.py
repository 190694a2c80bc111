"""A run's page in headless Chromium, as a phone shows it and without a network."""

from __future__ import annotations

import json
import re
import shutil
import subprocess

import pytest

import jaxtune
from tests.recipes.test_report import config_of, world

pytestmark = pytest.mark.slow
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--hide-scrollbars",
    "--allow-file-access-from-files",
    "--host-resolver-rules=MAP * ~NOTFOUND",
    "--virtual-time-budget=4000",
)
# Measures the page in a frame that is as wide as a phone, and says so in its own title.
FRAME = """<!DOCTYPE html><title>waiting</title><iframe src="report.html"
style="width:390px;height:844px;border:0"></iframe><script>
document.querySelector("iframe").onload = event => {
  const page = event.target.contentDocument, root = page.documentElement;
  const drawn = [...page.querySelectorAll("svg")].filter(s => s.clientHeight > 20);
  document.title = "found " + JSON.stringify({
    wide: root.scrollWidth, tall: root.scrollHeight, drawn: drawn.length,
    svgs: page.querySelectorAll("details:not([open]) svg").length + drawn.length,
    all: page.querySelectorAll("svg").length,
    size: parseFloat(getComputedStyle(page.body).fontSize)});
};</script>"""

__all__ = ["world"]


def chromium(*words: str) -> str:
    """Runs Chromium and returns what it prints."""
    command = [CHROMIUM, *FLAGS, *words]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout


@pytest.mark.skipif(not CHROMIUM, reason="needs Chromium: apt-get install chromium")
def test_the_page_of_a_run_is_drawn_on_a_phone(world, tmp_path):
    import matplotlib.image

    jaxtune.train(config_of(world), tmp_path)
    (tmp_path / "frame.html").write_text(FRAME)
    page = chromium("--dump-dom", f"file://{tmp_path}/frame.html")
    found = json.loads(re.search(r"<title>found (.*?)</title>", page)[1].replace("&quot;", '"'))
    assert found["wide"] <= 390 and found["tall"] > 1500 and found["size"] >= 16
    assert found["svgs"] == found["all"] and found["drawn"] >= 4
    shot = tmp_path / "phone.png"
    chromium(f"--screenshot={shot}", "--window-size=500,1000", f"file://{tmp_path}/report.html")
    image = matplotlib.image.imread(shot)
    assert image.shape[:2] == (1000, 500)
    # Neither blank nor cut off: there is ink in every quarter of the screen.
    assert all(
        part[..., :3].std() > 0.01 for part in (image[i : i + 250] for i in range(0, 1000, 250))
    )
