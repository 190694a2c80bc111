"""A run that is continued with changes, out of an older checkpoint, or looked at meanwhile."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from jaxtune.core.errors import RequestError
from jaxtune.recipes.runs import open_run
from tests.correctness import interrupts
from tests.correctness.interrupts import Workbench
from tests.correctness.tiny_runs import (
    rows,
    run_config,
    steps,
    tree_hash,
    write_tokens,
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def bench() -> Workbench:
    return Workbench()


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> dict:
    return run_config(
        tmp_path_factory.mktemp("data"),
        peft={"method": "bitfit"},
        total_steps=9,
        checkpoint__every_steps=3,
        checkpoint__keep=2,
        checkpoint__keep_best="eval/loss",
        eval__every_steps=3,
    )


@pytest.fixture(scope="module")
def finished(bench: Workbench, config: dict, tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("finished") / "run"
    assert bench.train(config, workdir).summary["stop_reason"] == "finished"
    return workdir


def test_the_best_checkpoint_is_the_one_that_was_measured(
    finished: Path, bench: Workbench, config: dict, tmp_path: Path
) -> None:
    losses = {row["step"]: row["eval/loss"] for row in rows(finished) if "eval/loss" in row}
    best = min(losses, key=losses.get)
    assert steps(finished) == sorted({6, 9, best})
    assert open_run(finished).step == best
    workdir = tmp_path / "run"
    # This save follows no evaluation, so it cannot count as the best.
    with interrupts.sigterm_at(4):
        stopped = bench.train(config, workdir).summary["step"]
    assert stopped == 5
    meta = json.loads((workdir / f"checkpoints/{stopped}/meta/metadata").read_text())
    assert meta["metrics"] == {}
    bench.train(config, workdir)
    assert steps(workdir) == steps(finished)
    assert open_run(workdir).step == best


def test_looking_at_a_run_changes_nothing_in_it(finished: Path, tmp_path: Path) -> None:
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir)
    # A checkpoint that the training process is writing at this moment.
    (workdir / "checkpoints/10.orbax-checkpoint-tmp/model").mkdir(parents=True)
    before = tree_hash(workdir)
    open_run(workdir)
    assert tree_hash(workdir) == before


def test_a_finished_run_is_made_longer_and_does_not_look_finished_on_the_way(
    finished: Path, bench: Workbench, config: dict, tmp_path: Path
) -> None:
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir)
    longer = config | {"total_steps": 11}
    before = tree_hash(workdir)
    with pytest.raises(RequestError, match=r"total_steps.*started with 9, not 11"):
        bench.train(longer, workdir)
    assert tree_hash(workdir) == before
    with interrupts.in_the_data(1):
        bench.train(longer, workdir, allow_change=True)
    assert json.loads((workdir / "config.json").read_text())["total_steps"] == 11
    result = bench.train(longer, workdir)  # the change is the run's own now
    assert (result.summary["stop_reason"], result.summary["step"]) == ("finished", 11)
    assert len(bench.batches) == 2 and rows(workdir)[: len(rows(finished))] == rows(finished)
    with pytest.raises(RequestError, match="the run is at step 11 already; 9 steps"):
        bench.train(config, workdir, allow_change=True)


def test_the_summary_accounts_for_every_token(bench: Workbench, tmp_path: Path) -> None:
    """C12, C13: kept + dropped + truncated = tokens of the file, in summary.json."""
    write_tokens(tmp_path / "a.jsonl", 20, seed=4, shortest=8)
    records = [json.loads(line) for line in (tmp_path / "a.jsonl").open()]
    config = run_config(
        tmp_path,
        peft={"method": "bitfit"},
        data__overlong="truncate",
        data__seq_len=12,
        total_steps=None,
        total_epochs=1,
        eval__every_steps=None,
    )
    summary = bench.train(config, tmp_path / "run").summary
    sources = summary["data"]["sources"]
    for counts in sources:
        parts = ("tokens_kept", "tokens_dropped", "tokens_truncated")
        assert counts["tokens_in"] == sum(counts[name] for name in parts)
    assert sources[0]["tokens_in"] == sum(len(record["input_ids"]) for record in records)
    assert sources[0]["truncated"] == sum(len(record["input_ids"]) > 12 for record in records) > 0
    assert summary["tokens"] == summary["data"]["tokens_per_epoch"]
