"""C26, C27 for objectives that sample: a run stopped in an iteration is the one never stopped."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.correctness import interrupts
from tests.correctness.interrupts import Workbench
from tests.correctness.tiny_runs import arrays, assert_same_run, rows, steps
from tests.rl.tiny import replaying, run_config

pytestmark = pytest.mark.slow

# Everything that a checkpoint must carry: the reference of full training, an adapted KL
# coefficient in the loss, further rounds of prompts, values. What is replayed needs nothing there.
RUNS = {
    "grpo": {
        "peft": {"method": "full"},
        "objective__dynamic_sampling": 2,
        "objective__kl_target": 0.01,
        "objective__kl_gain": 0.5,
    },
    "ppo": {"objective__whiten": True, "grad_accum": 1},
}


@pytest.fixture(scope="module")
def bench() -> Workbench:
    return Workbench()


@pytest.fixture(scope="module", params=RUNS)
def undisturbed(request, bench: Workbench, tmp_path_factory):
    """(config, workdir, batches) of a run that nothing stopped."""
    data = tmp_path_factory.mktemp(request.param)
    config = run_config(data, request.param, **RUNS[request.param])
    if request.param == "ppo":
        config["retention"] = replaying(data, replay_kl=0.1, replay_batch_size=2)
    result = bench.train(config, data / "undisturbed")
    assert result.summary["stop_reason"] == "finished"
    assert len(set(bench.batches)) == 12
    return config, data / "undisturbed", bench.batches


def test_a_run_stopped_anywhere_in_an_iteration_is_the_undisturbed_run(
    undisturbed, bench: Workbench, tmp_path: Path
) -> None:
    config, reference, batches = undisturbed
    workdir = tmp_path / "run"
    moments = [
        # what stops the run, and the newest checkpoint from then on; saves are at 3, 6, 9, 12 and
        # iterations begin at 0, 4, 8
        (interrupts.in_the_data(2), 0),
        (interrupts.after_the_row(5), 3),
        (interrupts.in_the_save(6), 6),
        (interrupts.in_the_evaluation(0), 9),
        (interrupts.before_the_summary(), 12),
    ]
    before = 0
    for moment, newest in moments:
        with moment:
            bench.train(config, workdir)
        assert bench.batches == batches[before : before + len(bench.batches)]
        before = newest
        assert (steps(workdir)[-1] if newest else 0) == newest
    assert bench.train(config, workdir).summary["stop_reason"] == "finished"
    assert_same_run(reference, workdir)
    samples = [(d / "samples.jsonl").read_text() for d in (reference, workdir)]
    assert samples[0] == samples[1]
    shown = [json.loads(line) for line in samples[0].splitlines()]
    assert [row["iteration"] for row in shown] == sorted(4 * [0, 1, 2])
    assert {row["step"] for row in shown} == {1, 5, 9}


def test_sigterm_stops_at_the_next_step_with_the_rollouts_saved(
    undisturbed, bench: Workbench, tmp_path: Path
) -> None:
    config, reference, batches = undisturbed
    workdir = tmp_path / "run"
    with interrupts.sigterm_at(4):  # shown while the iteration after it is being sampled, or just
        result = bench.train(config, workdir)  # after
    assert result.summary["stop_reason"] == "preempted"
    done = result.summary["step"]
    assert 4 <= done <= 6 and done == len(bench.batches)
    held = {name for name in arrays(workdir) if name.startswith("feed/rows/")}
    assert ("feed/rows/advantages" in held) == (done % 4 > 0)
    assert rows(workdir) == [r for r in rows(reference) if r["step"] <= done]
    assert bench.train(config, workdir).summary["stop_reason"] == "finished"
    assert bench.batches == batches[done:]
    assert_same_run(reference, workdir)
