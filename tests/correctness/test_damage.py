"""A damaged checkpoint is passed over for the newest whole one; a full disk loses none.

The run that goes on is the undisturbed one to the bit (C26).
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import jax.numpy as jnp
import pytest

from jaxtune.checkpoints.runs import RunCheckpoints, UnwrittenCheckpoint
from jaxtune.cli import main
from jaxtune.core.errors import RequestError
from tests.correctness import interrupts
from tests.correctness.interrupts import Workbench
from tests.correctness.tiny_runs import arrays, rows, run_config, steps, tree_hash

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def bench() -> Workbench:
    return Workbench()


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> dict:
    return run_config(tmp_path_factory.mktemp("data"), checkpoint__keep=3, total_steps=9)


@pytest.fixture(scope="module")
def undisturbed(bench: Workbench, config: dict, tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("undisturbed") / "run"
    bench.train(config, workdir)
    return workdir


@pytest.fixture(scope="module")
def stopped(bench: Workbench, config: dict, tmp_path_factory) -> Path:
    """A run with checkpoints 3 and 6."""
    workdir = tmp_path_factory.mktemp("stopped") / "run"
    with interrupts.after_the_save(6):
        bench.train(config, workdir)
    assert steps(workdir) == [3, 6]
    return workdir


@pytest.fixture
def workdir(stopped: Path, tmp_path: Path) -> Path:
    shutil.copytree(stopped, tmp_path / "run")
    return tmp_path / "run"


def cut(path: Path, share: float = 0.5) -> None:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


def cut_arrays(item: Path, share: float = 0.5) -> None:
    """Cuts all files with values; which of them holds what is TensorStore's affair."""
    for path in item.rglob("d/*"):
        cut(path, share)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "array cut": lambda step: cut_arrays(step / "model"),
    "array empty": lambda step: cut_arrays(step / "model", 0.0),
    "state cut": lambda step: cut_arrays(step / "state"),
    "no state": lambda step: shutil.rmtree(step / "state"),
    "no model": lambda step: shutil.rmtree(step / "model"),
    "no meta": lambda step: shutil.rmtree(step / "meta"),
    "meta cut": lambda step: cut(step / "meta/metadata"),
    "meta other": lambda step: (step / "meta/metadata").write_text("{}"),
    "nothing": lambda step: (shutil.rmtree(step), step.mkdir()),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_the_newest_whole_checkpoint_is_taken(
    kind: str, workdir: Path, undisturbed: Path, bench: Workbench, config: dict, caplog
) -> None:
    DAMAGE[kind](workdir / "checkpoints/6")
    damaged = tree_hash(workdir / "checkpoints/6")
    with caplog.at_level(logging.WARNING, "jaxtune"):
        result = bench.train(config, workdir)
    (told,) = [r.getMessage() for r in caplog.records if r.name == "jaxtune"]
    assert "checkpoints/6: the checkpoint is damaged" in told
    assert "goes on from step 3" in told
    assert result.summary["stop_reason"] == "finished" and len(bench.batches) == 6
    assert list(result.summary["damaged_checkpoints"]) == ["6"]
    # What could not be read is kept beside, since the fault may be the disk's.
    assert tree_hash(workdir / "damaged/6") == damaged
    assert steps(workdir) == [3, 6, 9]
    assert rows(workdir) == rows(undisturbed)
    ours, theirs = arrays(workdir), arrays(undisturbed)
    assert all(array.tobytes() == theirs[name].tobytes() for name, array in ours.items())


def test_two_damaged_ones_are_passed_over_and_three_refused(
    workdir: Path, bench: Workbench, config: dict
) -> None:
    (workdir / "checkpoints/8").mkdir()
    for step in (3, 6):
        cut_arrays(workdir / f"checkpoints/{step}/model")
    before = tree_hash(workdir)
    with pytest.raises(RequestError, match=r"checkpoints/8: .*no checkpoint of the run is whole"):
        bench.train(config, workdir)
    assert tree_hash(workdir) == before


def test_what_does_not_fit_is_no_damage(workdir: Path, bench: Workbench, config: dict) -> None:
    """Arrays of another rank are a wrong request, for which no older checkpoint is taken."""
    before = tree_hash(workdir)
    other = config | {"peft": config["peft"] | {"rank": 5}}
    with pytest.raises(RequestError, match="checkpoints/6/model"):
        bench.train(other, workdir, allow_change=True)
    assert tree_hash(workdir) == before


def test_a_failed_save_is_not_looked_at_before_orbax_has_seen_it(tmp_path: Path) -> None:
    """Its error is given away once; unseen by the thread that removes older ones, it loses them."""
    checkpoints = RunCheckpoints(tmp_path / "checkpoints", keep=1)
    arrays, looked, manager = {"a": jnp.zeros(3)}, threading.Event(), checkpoints.manager
    checkpoints.save(1, arrays, arrays, {}, {})
    checkpoints.wait()
    finish = manager._wait_for_checkpointers

    def later() -> None:
        looked.wait()
        finish()

    with mock.patch.object(manager, "_wait_for_checkpointers", later):
        checkpoints.save(2, arrays, arrays, {}, {})
        background = manager._checkpointer._async_manager
        background._thread.join()
        background._exception = OSError("no more")
        checkpoints.check()
        looked.set()
        with pytest.raises(UnwrittenCheckpoint, match="no more"):
            checkpoints.wait()
    assert 1 in steps(tmp_path)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of three megabytes."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(place)]
    done = subprocess.run(command, capture_output=True, check=False)
    if done.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {done.stderr.decode().strip()}")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


# What TensorStore's threads would tell a closed loop, and print.
@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("background", [True, False])
def test_a_full_disk_keeps_the_checkpoint_before_and_says_so(
    small_disk: Path, undisturbed: Path, bench: Workbench, config: dict, background: bool
) -> None:
    ballast = small_disk / "ballast"
    save = RunCheckpoints.save
    config = config | {"checkpoint": {"every_steps": 3, "keep": 1, "async_save": background}}

    def filled(self: RunCheckpoints, step: int, *rest: object) -> None:
        if step == 6:
            self.wait()
            free = os.statvfs(small_disk)
            ballast.write_bytes(bytes(free.f_bavail * free.f_frsize - 40_000))
        save(self, step, *rest)

    workdir = small_disk / "run"
    with (
        mock.patch.object(RunCheckpoints, "save", filled),
        pytest.raises(UnwrittenCheckpoint, match=r"step 6 .*No space left.* step 3 is kept"),
    ):
        bench.train(config, workdir)
    summary = json.loads((workdir / "summary.json").read_text())
    assert summary["stop_reason"] == "error" and "No space left on device" in summary["error"]
    assert steps(workdir) == [3]
    assert not [p for p in (workdir / "checkpoints").iterdir() if "tmp" in p.name]
    ballast.unlink()
    assert bench.train(config, workdir).summary["stop_reason"] == "finished"
    assert len(bench.batches) == 6
    assert rows(workdir) == rows(undisturbed)


def test_a_failed_save_is_one_line_on_the_command_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def failing(_: list[str]) -> int:
        error = UnwrittenCheckpoint("the checkpoint of step 6\ncould not be written")
        error.add_note("the run failed; see summary.json")
        raise error

    monkeypatch.setattr(main, "_dispatch", failing)
    assert main.main(["train"]) == 1
    line = "the checkpoint of step 6 could not be written; the run failed; see summary.json"
    assert capsys.readouterr().err == f"jaxtune: failed: {line}\n"
    # Orbax logs the exceptions that it raises, each with its traceback.
    error = (OSError, OSError("no space"), None)
    records = [
        logging.LogRecord(name, logging.ERROR, "", 1, "failed", (), raised)
        for name, raised in [("absl", error), ("absl", None), ("jaxtune", error)]
    ]
    assert [main._worth_telling(record) for record in records] == [False, True, True]
