"""C28: a checkpoint belongs to no mesh and to no number of processes. (orbax #648, #683)"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxtune.core.errors import RequestError
from tests.conftest import ROOT
from tests.correctness import interrupts
from tests.correctness.interrupts import Workbench
from tests.correctness.tiny_runs import arrays, rows, run_config, steps

pytestmark = pytest.mark.slow

MESHES = {
    "4x2 data fsdp": {"data": 4, "fsdp": 2},
    "4x2 fsdp tensor": {"data": 1, "fsdp": 4, "tensor": 2},
    "1": {"data": 1, "fsdp": 1},
    "2x4 data fsdp": {"data": 2, "fsdp": 4},
    "8x1 fsdp": {"data": 1, "fsdp": 8},
}
SAVED = ("4x2 data fsdp", "4x2 fsdp tensor")
RESTORED = ("1", "2x4 data fsdp", "8x1 fsdp")
SIZES = {"peft": {"method": "full"}, "batch_size": 8, "grad_accum": 1, "eval__batch_size": 8}
# Numbers that a mesh decides by rounding alone.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(scope="module")
def bench() -> Workbench:
    return Workbench()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def undisturbed(bench: Workbench, data: Path, tmp_path_factory) -> Path:
    """Twelve steps on one device."""
    workdir = tmp_path_factory.mktemp("undisturbed") / "run"
    bench.train(run_config(data, mesh=MESHES["1"], **SIZES), workdir)
    return workdir


@pytest.fixture(scope="module", params=SAVED)
def half(request, bench: Workbench, data: Path, tmp_path_factory) -> Path:
    """A run stopped at step 6 on eight devices."""
    workdir = tmp_path_factory.mktemp("half") / "run"
    with interrupts.in_the_save(6):
        bench.train(run_config(data, mesh=MESHES[request.param], **SIZES), workdir)
    assert steps(workdir) == [3, 6]
    return workdir


def assert_close(left: list[dict], right: list[dict]) -> None:
    """Two lists of rows of metrics agree but for rounding."""
    assert [list(row) for row in left] == [list(row) for row in right]
    for one, two in zip(left, right, strict=True):
        exact = ("step", "tokens", "trained_tokens", "learning_rate", "eval/tokens")
        assert all(one[name] == two[name] for name in exact if name in one)
        losses = [name for name in one if name.endswith("loss")]
        assert losses
        for name in losses:
            np.testing.assert_allclose(one[name], two[name], err_msg=f"{one['step']}", **CLOSE)


@pytest.mark.parametrize("mesh", RESTORED)
def test_saved_on_one_mesh_and_restored_on_another(
    half: Path, undisturbed: Path, bench: Workbench, data: Path, tmp_path: Path, mesh: str
) -> None:
    workdir = tmp_path / "run"
    shutil.copytree(half, workdir)
    config = run_config(data, mesh=MESHES[mesh], **SIZES)
    with pytest.raises(RequestError, match=r"mesh\..*--allow_change"):
        bench.train(config, workdir)
    result = bench.train(config, workdir, allow_change=True)
    assert result.summary["devices"] == np.prod(list(MESHES[mesh].values()))
    assert len(bench.batches) == 6
    assert_close(rows(workdir), rows(undisturbed))
    ours, theirs = arrays(workdir), arrays(undisturbed)
    for name, array in ours.items():
        if name.startswith("model"):
            np.testing.assert_allclose(array, theirs[name], rtol=1e-4, atol=1e-4, err_msg=name)


def test_the_number_of_devices_may_change_where_the_mesh_takes_what_is_left(
    bench: Workbench, data: Path, undisturbed: Path, tmp_path: Path, monkeypatch
) -> None:
    """`mesh.fsdp = -1` is the default: the same command goes on on another machine."""
    from jaxtune.recipes import build

    config = run_config(data, mesh={}, **SIZES)
    make = build.make_mesh
    fewer = Workbench()
    with monkeypatch.context() as patch:
        patch.setattr(build, "make_mesh", lambda shape: make(shape, jax.devices()[:2]))
        with interrupts.in_the_save(6):
            fewer.train(config, tmp_path / "run")
    result = bench.train(config, tmp_path / "run")
    assert result.summary["devices"] == 8
    assert_close(rows(tmp_path / "run"), rows(undisturbed))


def in_two_processes(config: dict, workdir: Path, stop: int) -> None:
    """Trains in two processes with two devices each, up to the save of `stop`."""
    path = workdir.parent / "config.json"
    path.write_text(json.dumps(config))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tests.correctness.process_run", str(path), str(workdir)]
    started = [
        subprocess.Popen(
            [*command, str(port), "2", str(rank)],
            env=os.environ | {"STOP_AFTER_SAVE": str(stop)},
            cwd=ROOT,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for rank in range(2)
    ]
    for out, err in [process.communicate(timeout=400) for process in started]:
        assert out.strip().endswith("stopped"), err[-3000:]
    assert steps(workdir)[-1] == stop


@pytest.mark.parametrize(("method", "start"), [("full", 3), ("lora", 0)])
def test_saved_by_one_process_and_restored_by_two_and_back(
    bench: Workbench, data: Path, tmp_path: Path, method: str, start: int
) -> None:
    """From one process to two at `start` (0: begun in two), and from two to one at step 6."""
    config = run_config(
        data,
        **SIZES | {"peft": {"method": method}},
        mesh={"data": 2, "fsdp": 2},
        log__tensorboard=True,
    )
    bench.train(config, tmp_path / "one")
    workdir = tmp_path / "run"
    if start:
        with interrupts.in_the_save(start):
            bench.train(config, workdir)
    in_two_processes(config, workdir, stop=6)
    writers = len(list((workdir / "tensorboard").iterdir()))
    assert writers == (2 if start else 1)  # one in each session, though two processes ran
    result = bench.train(config, workdir)
    assert result.summary["stop_reason"] == "finished" and len(bench.batches) == 6
    assert_close(rows(workdir), rows(tmp_path / "one"))
    assert steps(workdir) == [9, 12]
