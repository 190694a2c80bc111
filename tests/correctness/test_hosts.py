"""C26, C27, C28 for several processes: real ones on this machine, joined by gloo.

A run goes from two processes to four, to two others and to one, stopped on the way by SIGTERM to
one process and by SIGKILL of another, process 0 included, and is the undisturbed run to 1e-5.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.correctness.hosts import Hosts
from tests.correctness.interrupts import Workbench
from tests.correctness.test_damage import cut_arrays
from tests.correctness.test_resume_mesh import assert_close
from tests.correctness.tiny_runs import arrays, rows, run_config, steps

pytestmark = pytest.mark.slow

SIZES = {"batch_size": 8, "grad_accum": 1, "eval__batch_size": 4, "total_steps": 16}
MESH = {"data": 2, "fsdp": 2}


class World:
    """Configs on disk, and the processes.

    Attributes:
        config: of four devices.
        host: starts processes.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        self.config = run_config(directory / "data", mesh=MESH, **SIZES)
        self.hosts = Hosts(directory / "logs")

    def train(self, name: str, **changes: object) -> list[str]:
        """The arguments of a run, with keys of its config changed."""
        path = self.directory / f"{name}.json"
        path.write_text(json.dumps(self.config | changes))
        more = ["--allow_change"] if changes else []
        return ["train", f"--config={path}", f"--workdir={self.directory / name}", *more]

    def summary(self, name: str) -> dict:
        return json.loads((self.directory / name / "summary.json").read_text())


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    world = World(tmp_path_factory.mktemp("hosts"))
    yield world
    world.hosts.close()


@pytest.fixture(scope="module")
def bench() -> Workbench:
    return Workbench()


@pytest.fixture(scope="module")
def undisturbed(world: World, bench: Workbench) -> Path:
    """Sixteen steps in one process, on four of its devices."""
    workdir = world.directory / "undisturbed"
    bench.train(world.config, workdir)
    return workdir


def test_two_processes_train_and_evaluate_as_one(world: World, undisturbed: Path) -> None:
    assert world.hosts.run(world.train("two"), 2, 2) == [0, 0], world.hosts.all_said()
    workdir = world.directory / "two"
    assert_close(rows(workdir), rows(undisturbed))
    assert steps(workdir) == steps(undisturbed)
    ours, theirs = arrays(workdir), arrays(undisturbed)
    for name, array in ours.items():
        np.testing.assert_allclose(array, theirs[name], rtol=1e-4, atol=1e-4, err_msg=name)
    one, two = world.summary("undisturbed"), world.summary("two")
    assert two["stop_reason"] == "finished" and two["devices"] == 4
    # The data is the same, though each process read its own half.
    assert two["fingerprints"] == one["fingerprints"] and two["data"] == one["data"]

    command = ["eval", f"--workdir={workdir}", "--batch_size=4", "--json"]
    assert world.hosts.run(command, 2, 2) == [0, 0], world.hosts.all_said()
    told = [json.loads(x) for x in world.hosts.said(0).splitlines() if x.startswith("{")]
    assert len(told) == 1 and "{" not in world.hosts.said(1)
    (last,) = [row for row in rows(undisturbed) if row["step"] == 16 and "eval/loss" in row]
    assert told[0]["tokens"] == last["eval/tokens"]
    assert abs(told[0]["loss"] - last["eval/loss"]) < 1e-5


def test_a_run_goes_from_two_to_four_to_two_to_one_through_signals(
    world: World, undisturbed: Path, bench: Workbench
) -> None:
    hosts, workdir = world.hosts, world.directory / "run"
    # SIGTERM to process 1 alone: both save the same step and stop.
    codes = hosts.run(world.train("run"), 2, 2, signals={1: ("SIGTERM", 4)})
    assert codes == [1, 1], hosts.all_said()
    summary = world.summary("run")
    assert summary["stop_reason"] == "preempted"
    assert "SIGTERM to process 1" in summary["detail"]
    stopped = summary["step"]
    assert 4 <= stopped <= 7 and steps(workdir)[-1] == stopped
    assert_close(rows(workdir), [r for r in rows(undisturbed) if r["step"] <= stopped])

    # The checkpoint is damaged: all four go on from the one before. Process 3 is killed in the
    # midst of a step, after a save at 6 or 9.
    cut_arrays(workdir / f"checkpoints/{stopped}/model")
    older = steps(workdir)[-2]
    codes = hosts.run(world.train("run"), 4, 1, signals={3: ("SIGKILL", 10 - older)})
    assert codes == [1, 1, 1, -9], hosts.all_said()
    assert f"goes on from step {older}" in hosts.said(0)
    assert (workdir / f"damaged/{stopped}").is_dir()
    summary = world.summary("run")
    assert summary["stop_reason"] == "error"
    assert "process 3 of 4 (host " in summary["error"] and "killed" in summary["error"]
    for index in range(3):
        assert "the run stops: process 3 of 4" in hosts.said(index)
    assert steps(workdir)[-1] in (6, 9)

    # On another mesh, process 0 is killed, which JAX's own service does not survive.
    start = steps(workdir)[-1]
    command = world.train("run", mesh={"data": 1, "fsdp": 4})
    codes = hosts.run(command, 2, 2, signals={0: ("SIGKILL", 13 - start)})
    assert codes[0] == -9 and codes[1] != 0, hosts.all_said()
    summary = world.summary("run")
    assert summary["stop_reason"] == "error" and "process 0 of 2" in summary["error"]

    config = world.config | {"mesh": {"data": 1, "fsdp": 1}}
    result = bench.train(config, workdir, allow_change=True)
    assert result.summary["stop_reason"] == "finished"
    assert len(bench.batches) < 16 - 6
    assert_close(rows(workdir), rows(undisturbed))


def test_a_process_that_does_not_start_is_named_within_the_limit(world: World) -> None:
    codes = world.hosts.run(world.train("absent"), 3, 1, absent=1, limit=15)
    assert codes == [2, 2], world.hosts.all_said()
    for index in range(2):
        assert "process 1 of 3 did not start within 15 s" in world.hosts.said(index)
    assert not (world.directory / "absent").exists()


def test_what_one_process_refuses_ends_all(world: World) -> None:
    """A bad line in the part of process 1 is named by both, and nothing is written."""
    source = world.directory / "bad.jsonl"
    good = json.dumps({"input_ids": [4, 5, 6]})
    source.write_text("".join(f"{good}\n" for _ in range(40)) + '{"input_ids": [4, "x"]}\n')
    data = world.config["data"] | {"train": [{"source": f"jsonl:{source}", "format": "tokens"}]}
    codes = world.hosts.run(world.train("refused", data=data), 2, 2)
    assert codes == [2, 2], world.hosts.all_said()
    for index in range(2):
        assert "bad.jsonl:41" in world.hosts.said(index)
    assert not (world.directory / "refused").exists()


def test_no_witness_outlives_its_run(world: World) -> None:
    """Last in this file: killed, stopped, refused and finished runs lie behind."""
    until = time.monotonic() + 60
    while world.hosts.witnesses() and time.monotonic() < until:
        time.sleep(0.1)
    assert world.hosts.ports and world.hosts.witnesses() == []
