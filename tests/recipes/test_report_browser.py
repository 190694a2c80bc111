"""The pages of a run, of a sweep and of the data doctor in headless Chromium, on a phone."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess

import pytest

import jaxtune
from jaxtune.cli.main import main
from jaxtune.recipes.report.sweep import write_sweep
from jaxtune.recipes.sweep.sweep import Row
from tests.recipes.test_report import config_of, world

__all__ = ["world"]
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, BROWSERS)), "")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM, reason="needs Chromium: apt-get install chromium"),
]
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--hide-scrollbars",
    "--allow-file-access-from-files",
    "--host-resolver-rules=MAP * ~NOTFOUND",
    "--virtual-time-budget=4000",
)
# Measures pages in frames that are as wide as a phone, and says so in its own title. What is folded
# away is opened first.
FRAMES = """<!DOCTYPE html><title>waiting</title>{frames}<script>
addEventListener("load", () => {{
  document.title = "found " + JSON.stringify([...document.querySelectorAll("iframe")].map(f => {{
    const page = f.contentDocument;
    page.querySelectorAll("details").forEach(d => {{ d.open = true; }});
    const svgs = [...page.querySelectorAll("svg")];
    return {{wide: page.documentElement.scrollWidth, tall: page.documentElement.scrollHeight,
      svgs: svgs.length, drawn: svgs.filter(s => s.clientHeight > 20).length,
      size: parseFloat(getComputedStyle(page.body).fontSize),
      label: Math.min(...[...page.querySelectorAll("svg text")].map(t =>
        parseFloat(getComputedStyle(t).fontSize) * t.getScreenCTM().a))}};
  }}));
}});</script>"""


def chromium(*words: str) -> str:
    """Runs Chromium and returns what it prints."""
    command = [CHROMIUM, *FLAGS, *words]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout


def measured(directory, pages) -> list[dict[str, float]]:
    """Returns what a browser of a phone's width finds of each page."""
    frames = "".join(
        f'<iframe src="{page}" style="width:390px;height:844px;border:0"></iframe>'
        for page in pages
    )
    (directory / "frames.html").write_text(FRAMES.format(frames=frames))
    dom = chromium("--dump-dom", f"file://{directory}/frames.html")
    return json.loads(html.unescape(re.search(r"<title>found (.*?)</title>", dom)[1]))


@pytest.fixture(scope="module")
def pages(world, tmp_path_factory):
    """A directory with `trial/report.html`, `report.html` of a sweep, and `doctor.html`."""
    directory = tmp_path_factory.mktemp("pages")
    config = config_of(world)
    jaxtune.train(config, directory / "trial")
    rows = [
        Row("trial", "finished", 1.0 + number, 4, {"optim.lr": lr, "peft.method": method})
        for number, (lr, method) in enumerate([(1e-3, "lora"), (1e-2, "ia3")])
    ]
    write_sweep(directory, rows, "loss")
    data = ["data", "doctor", f"--data={config['data']['train'][0]['source']}", "--format=chat"]
    assert main([*data, f"--html={directory}/doctor.html"]) == 0
    return directory


def test_pages_fit_a_phone_and_are_drawn(pages):
    run, sweep, doctor = measured(pages, ["trial/report.html", "report.html", "doctor.html"])
    for page in (run, sweep, doctor):
        assert page["wide"] <= 390 and page["size"] >= 16
        assert page["drawn"] == page["svgs"] and page["label"] >= 11
    assert run["svgs"] >= 5 and run["tall"] > 1500
    assert sweep["svgs"] == 2
    assert doctor["svgs"] >= 1


@pytest.mark.parametrize("page", ["trial/report.html", "report.html", "doctor.html"])
def test_screenshots_have_ink(pages, page):
    import matplotlib.image

    shot = pages / "shot.png"
    chromium(f"--screenshot={shot}", "--window-size=500,800", f"file://{pages}/{page}")
    image = matplotlib.image.imread(shot)[..., :3]
    assert image.shape[:2] == (800, 500)
    assert all(image[top : top + 200].std() > 0.01 for top in range(0, 800, 200))
