"""The tutorials: every block of every page runs, and its own asserts hold."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, SHARED, xla_flags
from tests.tpu_scripts.world import demolish
from tests.tutorials import cloud
from tests.tutorials.runner import run

PAGES = ROOT / "docs" / "tutorials"
SMALL_WORLD = ("instructions", "lora_or_full", "classifier", "rlhf")
# One device, as a reader has; what the suite compiled is used again.
ENVIRONMENT = {"XLA_FLAGS": xla_flags(devices=1), "PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="module")
def told(tmp_path_factory) -> dict[str, str]:
    """{page: its error, or nothing}, of one reader who goes through all of them."""
    project = tmp_path_factory.mktemp("reader") / "project"
    (project / "runs").mkdir(parents=True)
    shutil.copytree(ROOT / "configs", project / "configs")
    pages = SMALL_WORLD
    if (SHARED / "models").is_dir():
        (project.parent / "shared").symlink_to(SHARED)
        pages = (*pages, "legal")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        [sys.executable, "-m", "tests.tutorials.reader", *pages],
        cwd=project,
        env={**os.environ, **ENVIRONMENT, "PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (project / "told.json").is_file(), done.stderr[-4000:]
    found = json.loads((project / "told.json").read_text())
    return {page: f"{error}{done.stdout[-4000:]}" if error else "" for page, error in found.items()}


@pytest.mark.slow
@pytest.mark.parametrize("page", SMALL_WORLD)
def test_page_of_the_small_world(page, told):
    if told[page]:
        pytest.fail(told[page])


@pytest.mark.slow
def test_legal_page(told, shared):
    if told["legal"]:
        pytest.fail(told["legal"])


@pytest.mark.slow
def test_tpu_page(tmp_path):
    world = cloud.laptop(tmp_path)
    try:
        done = cloud.follow(world)
        assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
        assert len(world.calls("tpu-vm", "create")) == 2
        assert len(world.calls("tpu-vm", "delete")) == 2
        assert (world.cloud / "bucket/my-bucket/data/train.jsonl").is_file()
    finally:
        demolish(world)


def test_every_tutorial_is_run():
    assert {path.stem for path in PAGES.glob("*.md")} == {*SMALL_WORLD, "legal", "tpu"}


def test_a_block_that_fails_ends_the_page(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    page = "```python\nx = 1\n```\n```bash\n{}\n```\n```python\nopen('after', 'w')\n```\n"
    for line in ("exit 3", "jaxtune nonsense", "jaxtune --version && ls", "jaxtune nonsense | cat"):
        with pytest.raises(AssertionError):
            run(page.format(line), os.environ)
        assert not Path("after").exists()
    run(page.format("jaxtune nonsense || true"), os.environ)
    assert Path("after").exists()


def test_what_a_block_prints_takes_the_place_of_the_text_behind_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = "a\n```python\nprint(6 * 7)\n```\nb\n```text\nold\n```\nc\n"
    assert run(page, os.environ) == page.replace("old", "42")
    page = "```bash\njaxtune --version > v\ncat v\n```\n```text\n```\n"
    assert run(page.replace("cat v\n", ""), os.environ) == page.replace("cat v\n", "").replace(
        "text\n", "text\n\n"
    )
    assert Path("v").read_text().startswith("jaxtune ")
