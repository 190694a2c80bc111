"""The tutorials: every block of every page runs, and its own asserts hold."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from jaxtune.recipes.quickstart import story, texts
from jaxtune.recipes.quickstart.tokenizer import train_tokenizer
from tests.conftest import ROOT
from tests.tpu_scripts.world import build, demolish, executable

PAGES = ROOT / "docs" / "tutorials"
PRETRAIN_STEPS = 60  # the pages' base need not know much, only be a language model
# One device, as a reader has; what the suite compiled is used again.
ENVIRONMENT = {"XLA_FLAGS": "--xla_backend_optimization_level=0", "PYTHONPATH": str(ROOT)}


def follow(page: str, directory: Path, path: str = "", home: Path | None = None) -> None:
    """Runs a page in a directory as its reader would, with a Python of its own."""
    programs = os.pathsep.join(filter(None, (path, str(Path(sys.executable).parent))))
    environment = {
        **os.environ,
        **ENVIRONMENT,
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        "HOME": str(home or Path.home()),
    }
    command = [sys.executable, "-m", "tests.tutorials.runner", PAGES / f"{page}.md"]
    done = subprocess.run(
        command, cwd=directory, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-6000:]}"


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """The part of `runs/quickstart` that the pages use, from a shorter pretraining."""
    workdir = tmp_path_factory.mktemp("world")
    code = (
        "import sys; from pathlib import Path; from tests.tutorials.test_tutorials import pretrain;"
        " pretrain(Path(sys.argv[1]))"
    )
    environment = {**os.environ, **ENVIRONMENT}
    subprocess.run([sys.executable, "-c", code, workdir], check=True, cwd=ROOT, env=environment)
    return workdir


def pretrain(workdir: Path) -> None:
    """Makes `texts/` and `base/` as the quickstart does."""
    from jaxtune.recipes.language_model import load
    from jaxtune.recipes.train import train

    paths = texts.write(workdir / "texts")
    corpus = story._fields(paths["corpus"], "text")
    tokenizer = train_tokenizer(corpus, workdir / "tokenizer")
    config = story.pretrain_config(paths, tokenizer, PRETRAIN_STEPS)
    config["data"]["eval"], config["eval"] = [], {}
    assert train(config, workdir / "pretrain").summary["stop_reason"] == "finished"
    load(workdir / "pretrain", dtype="float32").save(workdir / "base")


@pytest.fixture
def project(tmp_path) -> Path:
    """A directory with what a checkout has at the top level."""
    directory = tmp_path / "project"
    (directory / "runs").mkdir(parents=True)
    shutil.copytree(ROOT / "configs", directory / "configs")
    return directory


@pytest.mark.slow
@pytest.mark.parametrize("page", ["instructions", "lora_or_full", "classifier", "rlhf"])
def test_page_of_the_small_world(page, base, project):
    (project / "runs" / "quickstart").symlink_to(base)
    follow(page, project)


@pytest.mark.slow
def test_legal_page(project, shared):
    (project.parent / "shared").symlink_to(shared)
    follow("legal", project)


@pytest.mark.slow
def test_tpu_page(tmp_path):
    world = build(tmp_path)
    shutil.rmtree(world.laptop / "configs")
    shutil.copytree(ROOT / "configs", world.laptop / "configs")
    executable(world.laptop / "bin" / "sleep", "#!/bin/sh\nexec /bin/sleep 0.05\n")
    (world.laptop / "tpu_scripts" / "env").unlink()
    try:
        follow("tpu", world.laptop, str(world.laptop / "bin"), world.laptop / "home")
        assert len(world.calls("tpu-vm", "create")) == 2
        assert len(world.calls("tpu-vm", "delete")) == 2
        assert (world.cloud / "bucket/my-bucket/data/train.jsonl").is_file()
    finally:
        demolish(world)


def test_every_tutorial_is_run():
    named = {"instructions", "lora_or_full", "classifier", "rlhf", "legal", "tpu"}
    assert {path.stem for path in PAGES.glob("*.md")} == named
