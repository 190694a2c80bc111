"""GRPO on two processes: both sample, the first scores, and they train as one process does."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.correctness.hosts import Hosts
from tests.correctness.tiny_runs import TIMINGS, arrays, rows, steps
from tests.rl.tiny import run_config

pytestmark = pytest.mark.slow

# Two devices, wherever they are; an iteration is four steps.
CHANGES = {"mesh": {"data": 1, "fsdp": 2}, "total_steps": 6, "data__eval": [], "eval": {}}


def no_judge(prompts: list[str], completions: list[str]) -> list[float]:
    """Fails, in the first process, which alone calls it."""
    raise ValueError("no judge today")


@pytest.fixture(scope="module")
def hosts(tmp_path_factory) -> Iterator[Hosts]:
    hosts = Hosts(tmp_path_factory.mktemp("logs"))
    yield hosts
    hosts.close()


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("data")


def command(directory: Path, name: str, **changes) -> list[str]:
    """The arguments of a run."""
    path = directory / f"{name}.json"
    path.write_text(json.dumps(run_config(directory, **CHANGES | changes)))
    return ["train", f"--config={path}", f"--workdir={directory / name}"]


def test_two_processes_stopped_in_an_iteration_go_on_as_one(hosts, data):
    """What they did, and what one process makes of their checkpoint, is the undisturbed run."""
    assert hosts.run(command(data, "one"), 1, 2) == [0], hosts.all_said()
    # SIGTERM to process 1 alone, when it places its second batch.
    codes = hosts.run(command(data, "two"), 2, 1, signals={1: ("SIGTERM", 1)})
    assert codes == [1, 1], hosts.all_said()
    summary = json.loads((data / "two/summary.json").read_text())
    assert summary["stop_reason"] == "preempted" and summary["devices"] == 2
    stopped = summary["step"]
    assert stopped < 4 and steps(data / "two")[-1] == stopped
    held = {name for name in arrays(data / "two") if name.startswith("feed/rows/")}
    assert "feed/rows/advantages" in held  # of an iteration that is not over
    done = rows(data / "two")
    assert [row["step"] for row in done] == list(range(1, stopped + 1))

    assert hosts.run(command(data, "two"), 1, 2) == [0], hosts.all_said()
    assert rows(data / "two")[:stopped] == done
    for ours, its in zip(rows(data / "two"), rows(data / "one"), strict=True):
        assert ours.keys() == its.keys()
        for name in ours.keys() - {*TIMINGS}:
            assert ours[name] == pytest.approx(its[name], rel=2e-4, abs=2e-5), name
    told = [(data / name / "samples.jsonl").read_text().splitlines() for name in ("one", "two")]
    first, second = ([json.loads(line) for line in lines] for lines in told)
    assert first == second and len(first) == 8  # written once, by the first


def test_a_reward_that_fails_in_the_first_process_ends_both(hosts, data):
    reward = {"function": "tests.rl.test_rl_hosts:no_judge"}
    codes = hosts.run(command(data, "failed", objective__rewards=[reward]), 2, 1)
    assert codes == [1, 1], hosts.all_said()
    summary = json.loads((data / "failed/summary.json").read_text())
    assert summary["stop_reason"] == "error" and "no judge today" in summary["error"]
    assert "process 0 of 2" in hosts.said(1), hosts.said(1)
