"""C26, C27: a run that is stopped and continued is the run that was never stopped, to the bit.

Public reports: accelerate #2016, ms-swift #10050 (data replayed or reordered), transformers #35850
(optimizer state dropped).
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.correctness import interrupts
from tests.correctness.interrupts import Workbench
from tests.correctness.tiny_runs import (
    arrays,
    assert_same_run,
    rows,
    run_config,
    steps,
    tree_hash,
)

pytestmark = pytest.mark.slow

METHODS = {
    "lora": {},
    "full": {"peft": {"method": "full"}, "optim__name": "muon", "grad_accum": 1},
    "prompt": {"peft": {"method": "prompt", "num_tokens": 3}, "data__packing": False},
}


@pytest.fixture(scope="module")
def bench() -> Workbench:
    return Workbench()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


@pytest.fixture(
    scope="module",
    params=["lora", "full", "prompt"],
)
def undisturbed(request, bench: Workbench, data: Path, tmp_path_factory):
    """(config, workdir, batches) of a run that nothing stopped."""
    config = run_config(data, **METHODS[request.param])
    workdir = tmp_path_factory.mktemp(request.param) / "undisturbed"
    result = bench.train(config, workdir)
    assert result.summary["stop_reason"] == "finished"
    assert len(set(bench.batches)) == 12
    return config, workdir, bench.batches


def test_a_run_stopped_at_every_kind_of_moment_is_the_undisturbed_run(
    undisturbed, bench: Workbench, tmp_path: Path
) -> None:
    config, reference, batches = undisturbed
    workdir = tmp_path / "run"
    moments = [
        # what stops the run, and the newest checkpoint from then on; saves are at 3, 6, 9, 12
        (interrupts.at_the_start(), 0),
        (interrupts.in_the_data(2), 0),
        (interrupts.after_the_row(4), 3),
        (interrupts.in_the_evaluation(0), 3),
        (interrupts.before_the_save(6), 3),
        (interrupts.in_the_save(6), 6),
        (interrupts.in_the_evaluation(0), 6),
        (interrupts.after_the_row(10), 9),
        (interrupts.before_the_summary(), 12),
    ]
    before = 0
    for moment, newest in moments:
        with moment:
            bench.train(config, workdir)
        # Each session reads on exactly where its checkpoint was.
        assert bench.batches == batches[before : before + len(bench.batches)]
        before = steps(workdir)[-1] if (workdir / "checkpoints").exists() and newest else 0
        assert before == newest
        with (workdir / "metrics.jsonl").open("ab") as file:
            file.write(b'{"step": 11, "lo')  # a kill may cut the last line short
    result = bench.train(config, workdir)
    assert bench.batches == [] and result.summary["stop_reason"] == "finished"
    assert_same_run(reference, workdir)
    assert result.history == [json.loads(x) for x in (workdir / "metrics.jsonl").open()]


def test_sigterm_saves_and_the_run_goes_on_to_the_same_bits(
    undisturbed, bench: Workbench, tmp_path: Path
) -> None:
    config, reference, batches = undisturbed
    workdir = tmp_path / "run"
    with interrupts.sigterm_at(4):
        result = bench.train(config, workdir)
    assert result.summary["stop_reason"] == "preempted"
    assert result.summary["step"] == steps(workdir)[-1] == len(bench.batches)
    assert "SIGTERM" in result.summary["detail"] and 4 <= result.summary["step"] <= 6
    assert rows(workdir) == [r for r in rows(reference) if r["step"] <= result.summary["step"]]
    assert bench.train(config, workdir).summary["stop_reason"] == "finished"
    assert bench.batches == batches[result.summary["step"] :]
    assert_same_run(reference, workdir)


def test_a_finished_run_returns_at_once_and_changes_nothing(undisturbed, bench: Workbench) -> None:
    config, workdir, _ = undisturbed
    before = tree_hash(workdir)
    result = bench.train(config, workdir)
    assert result.summary["stop_reason"] == "finished" and bench.batches == []
    assert len(result.history) == len(rows(workdir))
    assert tree_hash(workdir) == before


def test_what_is_saved_is_what_was_in_memory(undisturbed, bench: Workbench, tmp_path: Path) -> None:
    """C27: state tree equality after save and restore, while the next steps overwrite the state."""
    from unittest import mock

    import jax

    from jaxtune.checkpoints.runs import RunCheckpoints, named
    from jaxtune.core.tree import flatten
    from jaxtune.recipes import train as recipe

    config, _, _ = undisturbed
    held: dict[int, dict[str, np.ndarray]] = {}
    save, restore = RunCheckpoints.save, recipe.restore

    def note(model, state) -> dict[str, np.ndarray]:
        leaves = flatten(named({"model": model, "state": state}))
        return {name: np.array(leaf, copy=True) for name, leaf in leaves.items()}

    def noted(self, step, model, state, *rest) -> None:
        held[step] = note(model, state)
        save(self, step, model, state, *rest)

    workdir = tmp_path / "run"
    with mock.patch.object(RunCheckpoints, "save", noted), interrupts.after_the_row(10):
        bench.train(config, workdir)
    assert steps(workdir) == [6, 9]
    for step in (6, 9):
        stored = arrays(workdir, step)
        assert stored.keys() == held[step].keys()
        assert all(np.array_equal(stored[name], held[step][name]) for name in stored)

    def checked(*args):
        state, _ = restore(*args)
        got = note({"trainable": state.trainable}, {})
        want = {k: v for k, v in held[9].items() if k.startswith("model/trainable")}
        assert got.keys() == want.keys()
        assert all(np.array_equal(got[name], want[name]) for name in want)
        leaves = jax.tree.leaves(state.opt_state)
        assert len(leaves) == sum("/opt_state/" in name for name in held[9])
        assert int(state.step) == 9
        raise interrupts.Stopped

    with mock.patch.object(recipe, "restore", checked), pytest.raises(interrupts.Stopped):
        bench.train(config, workdir)
