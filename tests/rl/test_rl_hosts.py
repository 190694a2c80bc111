"""GRPO on two processes: both sample, the first scores, and they train as one process does.

And DPO of all weights, for which both compute the reference and the first writes it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.correctness.hosts import Hosts
from tests.correctness.pair_runs import pair_config
from tests.correctness.tiny_runs import TIMINGS, arrays, rows, steps
from tests.rl.tiny import letters, replaying, run_config, write_prompts

pytestmark = pytest.mark.slow

# Two devices, wherever they are; an iteration is four steps.
CHANGES = {
    "mesh": {"data": 1, "fsdp": 2},
    "total_steps": 6,
    "data__eval": [],
    "eval": {},
    "checkpoint": {"every_steps": 3, "async_save": False},
    "objective__rewards": [{"function": "tests.rl.test_rl_hosts:judge"}],
}


def judge(prompts: list[str], completions: list[str], flag: list[str]) -> list[float]:
    """As `letters`; where the file `flag` is there, only as often as it has lines."""
    path = Path(flag[0])
    if path.exists():
        left = path.read_text().splitlines()
        if not left:
            raise ValueError("no judge today")
        path.write_text("".join(f"{line}\n" for line in left[1:]))
    return letters(prompts, completions)


@pytest.fixture(scope="module")
def hosts(tmp_path_factory) -> Iterator[Hosts]:
    hosts = Hosts(tmp_path_factory.mktemp("logs"))
    yield hosts
    hosts.close()


def test_two_processes_that_end_in_an_iteration_go_on_as_one(hosts, tmp_path):
    """A reward that fails in the first process, which alone calls it, ends both.

    What they did, and what one process makes of their checkpoint, is the undisturbed run.
    """
    config, path, flag = run_config(tmp_path, **CHANGES), tmp_path / "c.json", tmp_path / "flag"
    config["retention"] = replaying(tmp_path, replay_batch_size=4)
    path.write_text(json.dumps(config))
    write_prompts(
        tmp_path / "train.jsonl",
        [
            {"prompt": word, "flag": str(flag)}
            for word in ("a", "ab", "cab", "b", "ba", "abc", "bb")
        ],
    )
    one, two = tmp_path / "one", tmp_path / "two"
    command = ["train", f"--config={path}"]
    assert hosts.run([*command, f"--workdir={one}"], 1, 2) == [0], hosts.all_said()

    flag.write_text("once\n")
    assert hosts.run([*command, f"--workdir={two}"], 2, 1) == [1, 1], hosts.all_said()
    summary = json.loads((two / "summary.json").read_text())
    assert summary["stop_reason"] == "error" and summary["step"] == 3  # logged
    assert "no judge today" in summary["error"]
    assert "process 0 of 2" in hosts.said(1), hosts.said(1)
    done = rows(two)
    assert [row["step"] for row in done] == [1, 2, 3] and steps(two) == [3]
    assert all(row["loss/replay"] == pytest.approx(0.5 * row["replay_nll"]) for row in done)
    held = {name for name in arrays(two) if name.startswith("feed/rows/")}
    assert "feed/rows/advantages" in held  # of an iteration that is not over

    flag.unlink()
    assert hosts.run([*command, f"--workdir={two}"], 1, 2) == [0], hosts.all_said()
    assert rows(two)[:3] == done
    for ours, its in zip(rows(two), rows(one), strict=True):
        assert ours.keys() == its.keys()
        for name in ours.keys() - {*TIMINGS}:
            assert ours[name] == pytest.approx(its[name], rel=2e-4, abs=2e-5), name
    told = [(run / "samples.jsonl").read_text().splitlines() for run in (one, two)]
    first, second = ([json.loads(line) for line in lines] for lines in told)
    assert first == second and len(first) == 8  # written once, by the first


def test_two_processes_begin_at_the_reference_that_both_computed(hosts, tmp_path):
    """The run itself would stop if a process had another column (C21)."""
    config = pair_config(tmp_path, "full", mesh={"data": 1, "fsdp": 2}, total_steps=2)
    config["data"]["eval"] = []
    path, workdir = tmp_path / "c.json", tmp_path / "run"
    path.write_text(json.dumps({name: part for name, part in config.items() if name != "eval"}))
    assert hosts.run(["train", f"--config={path}", f"--workdir={workdir}"], 2) == [0, 0], (
        hosts.all_said()
    )
    first, second = rows(workdir)
    assert first["loss"] == pytest.approx(math.log(2), rel=1e-5) and first["drift"] < 1e-5
    assert second["drift"] > 1e-3 and second["loss"] < first["loss"]
    assert len(list((workdir / "reference").iterdir())) == 1
