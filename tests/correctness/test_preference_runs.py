"""Whole runs on pairs: C3, C20, C21, C22 and C26, with a reference in the data and without."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest

import jaxtune
from jaxtune.cli.main import main
from jaxtune.core.errors import RequestError
from jaxtune.recipes import preference, reference_data
from jaxtune.recipes.assemble import load_parts
from jaxtune.recipes.build import build
from jaxtune.recipes.reference import COLUMN, WrongReference, adapters_off
from jaxtune.recipes.schema.resolve import resolve
from jaxtune.training.step import mean_loss, terms
from tests.correctness import interrupts
from tests.correctness.interrupts import Workbench
from tests.correctness.pair_runs import pair_config
from tests.correctness.small import METHODS
from tests.correctness.tiny_runs import assert_same_run, rows

pytestmark = pytest.mark.slow

WITHOUT_COLUMN = ("lora", "dora", "pissa", "houlsby", "ia3", "bitfit")
WITH_COLUMN = ("full", "prompt", "prefix")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("pairs")


def begun(config: dict, workdir: Path):
    """(plan with its reference, trained, the rest) of a run before its first step."""
    plan = build(resolve(config))
    params = load_parts(plan.base, plan.parts, plan.mesh, 0, None)
    trainable, frozen = plan.parts.split(params)
    with jax.set_mesh(plan.mesh):
        plan = reference_data.with_reference(plan, lambda: (trainable, frozen), workdir)
    return plan, trainable, frozen


@pytest.mark.parametrize("name", [*WITHOUT_COLUMN, *WITH_COLUMN])
def test_c21_every_method_begins_at_its_reference(name, data, tmp_path):
    """ln 2 and no margin before the first update: https://github.com/huggingface/trl/issues/6591."""
    plan, trainable, frozen = begun(pair_config(data, name), tmp_path)
    assert adapters_off(plan.parts, None) == (name in WITHOUT_COLUMN)
    assert (COLUMN in plan.data.stream.keys) == (name in WITH_COLUMN)
    with jax.set_mesh(plan.mesh):
        reference_data.check(plan, trainable, frozen)
        found = plan.evaluate(trainable, frozen)
    assert found["eval/loss"] == pytest.approx(np.log(2), rel=1e-5)
    assert abs(found["eval/margin"]) < 1e-5
    assert "eval/perplexity" not in found


@pytest.mark.parametrize("peft", ["lora", "full"])
def test_c21_a_run_whose_reference_is_another_model_stops_before_its_first_step(
    peft, data, tmp_path, monkeypatch
):
    config = pair_config(data, peft)
    wrong = preference.base_logprobs
    monkeypatch.setattr(preference, "base_logprobs", lambda *args: wrong(*args) - 0.01)
    column = reference_data.column
    monkeypatch.setattr(reference_data, "column", lambda *args: column(*args) - 0.01)
    path, workdir = tmp_path / "config.json", tmp_path / "run"
    path.write_text(json.dumps(config))
    assert main(["train", f"--config={path}", f"--workdir={workdir}"]) == 1
    summary = json.loads((workdir / "summary.json").read_text())
    assert summary["stop_reason"] == "error" and summary["step"] == 0
    assert "differ by 0.01 nats a token before the first update" in summary["error"]
    assert WrongReference.__name__ in summary["error"]
    assert not list((workdir / "checkpoints").glob("[0-9]*"))


TRAINS_MORE = {"method": "lora", "rank": 3, "train": ["final_norm/scale"]}


@pytest.fixture(scope="module")
def bench() -> Workbench:
    return Workbench()


@pytest.fixture(scope="module")
def finished(data, bench, tmp_path_factory):
    """(config, workdir) of a run whose reference is a column, as nothing stopped it."""
    config = pair_config(data, TRAINS_MORE, checkpoint={"every_steps": 2, "async_save": False})
    workdir = tmp_path_factory.mktemp("finished") / "run"
    assert bench.train(config, workdir).summary["stop_reason"] == "finished"
    return config, workdir


def test_c21_the_reference_stays_while_more_than_adapters_are_trained(finished):
    """The margin at the end is that to the parameters of the start."""
    config, workdir = finished
    last = {k: v for row in rows(workdir) for k, v in row.items() if k.startswith("eval/")}
    plan = build(resolve(config))
    start = load_parts(plan.base, plan.parts, plan.mesh, 0, None)
    end = jaxtune.load(workdir, dtype="float32").params
    held = next(iter(plan.data.evals.values()))
    moved = np.abs(start["final_norm"]["scale"] - end["final_norm"]["scale"]).max()
    assert moved > 1e-3
    with jax.set_mesh(plan.mesh):
        before, after = (
            reference_data.column(plan, held, *plan.parts.split(p)) for p in (start, end)
        )
    margins = []
    for i in range(len(held)):
        tokens = slice(held.offsets[i], held.offsets[i + 1])
        sides = held.example_columns(i)["completions"]
        ratio = (after - before)[tokens]
        margins.append(0.1 * (ratio[sides == 1].sum() - ratio[sides == 2].sum()))
    assert last["eval/margin"] == pytest.approx(np.mean(margins), rel=1e-4)
    assert last["eval/accuracy"] == pytest.approx(np.mean(np.array(margins) > 0))
    loss = np.mean(np.log1p(np.exp(-np.array(margins))))
    assert last["eval/loss"] == pytest.approx(loss, rel=1e-5)


def test_c26_a_run_that_is_stopped_reads_its_reference_again(
    finished, bench, tmp_path, monkeypatch
):
    config, workdir = finished
    again = tmp_path / "run"
    with interrupts.after_the_row(3):
        bench.train(config, again)
    (kept,) = (again / "reference").iterdir()
    monkeypatch.setattr(reference_data, "column", None)  # computing again would fail
    bench.train(config, again)
    assert_same_run(workdir, again)
    assert kept.read_bytes() == next((workdir / "reference").iterdir()).read_bytes()


def test_a_reference_is_kept_under_all_that_it_follows_from(data):
    """A run that goes on with other data or another model computes it anew."""
    plan = build(resolve(pair_config(data, "full")))
    stores = reference_data.stores_of(plan.data)
    kept = reference_data.fingerprint(plan, stores)

    def of(**changes) -> str:
        parts = dataclasses.replace(plan.parts, **changes)
        return reference_data.fingerprint(dataclasses.replace(plan, parts=parts), stores)

    model = plan.parts.config
    assert of(config=dataclasses.replace(model, attention="ring", remat="block")) == kept
    others = {
        of(config=dataclasses.replace(model, norm_eps=1e-3)),
        of(config=dataclasses.replace(model, dtype="bfloat16")),
        of(method=METHODS["lora"]),
        reference_data.fingerprint(plan, stores[::-1]),
        reference_data.fingerprint(build(resolve(pair_config(data, "full", seed=1))), stores),
    }
    assert len(others) == 5 and kept not in others


def test_a_damaged_reference_is_refused_and_a_missing_one_computed(finished, bench, tmp_path):
    config, workdir = finished
    again = tmp_path / "run"
    with interrupts.after_the_row(3):
        bench.train(config, again)
    (kept,) = (again / "reference").iterdir()
    whole = kept.read_bytes()
    for damaged in (whole[:-4], whole[:40] + b"\x00" * 4 + whole[44:], b""):
        kept.write_bytes(damaged)
        with pytest.raises(RequestError, match="damaged; delete the file"):
            bench.train(config, again)
    kept.unlink()
    bench.train(config, again)
    assert kept.read_bytes() == whole
    assert_same_run(workdir, again)


def test_c22_both_sides_stand_behind_the_same_prompt(data):
    """Tokenised twice, boundaries differ: https://github.com/huggingface/trl/issues/6433."""
    plan = build(resolve(pair_config(data)))
    batch = plan.data.stream.batch(0, 4)
    for row in range(4):
        sides = [
            batch["input_ids"][row][
                (batch["segment_ids"][row] == s) & (batch["completions"][row] == 0)
            ]
            for s in (1, 2)
        ]
        assert np.array_equal(*sides) and len(sides[0]) >= 2
        assert set(np.unique(batch["completions"][row])) == {0, 1, 2}


def first_loss(plan, params) -> float:
    """The loss of the first batch under these parameters."""
    with jax.set_mesh(plan.mesh):
        losses, _ = plan.loss(*plan.parts.split(params), plan.data.stream.batch(0, 4), None)
    return float(mean_loss(terms(losses)))


@pytest.mark.parametrize("name", ["orpo", "simpo", "cpo"])
def test_c26_losses_without_a_reference_learn_and_go_on_exactly(name, data, bench, tmp_path):
    """Without dropout, so that the first loss is that of the model as it was loaded."""
    config = pair_config(
        data,
        {"method": "lora", "rank": 3},
        objective={"name": name},
        eval={"every_steps": 3},
        checkpoint={"every_steps": 2, "async_save": False},
        total_steps=6,
    )
    history = bench.train(config, tmp_path / "one").history
    plan = build(resolve(config))
    start = load_parts(plan.base, plan.parts, plan.mesh, 0, None)
    end = jaxtune.load(tmp_path / "one", dtype="float32").params
    before, after = (first_loss(plan, params) for params in (start, end))
    assert history[0]["loss"] == pytest.approx(before, rel=1e-5)
    assert after < 0.99 * before
    held = [row for row in history if "eval/loss" in row]
    assert [row["step"] for row in held] == [3, 6]
    assert held[1]["eval/loss"] != held[0]["eval/loss"] and "eval/margin" in held[1]
    assert not (tmp_path / "one/reference").exists()
    with interrupts.after_the_row(5):
        bench.train(config, tmp_path / "two")
    bench.train(config, tmp_path / "two")
    assert len(bench.batches) == 2  # from the checkpoint of step 4
    assert_same_run(tmp_path / "one", tmp_path / "two")


@pytest.mark.parametrize("name", ["dpo", "orpo", "simpo", "cpo"])
def test_c3_evaluation_does_not_depend_on_the_batch_size(name, data):
    """CORRECTNESS C3: one pair weighs as much as another, whatever batch it comes in."""
    results = []
    for size in (1, 4):
        config = pair_config(data, objective={"name": name}, eval={"batch_size": size})
        plan = build(resolve(config))
        params = load_parts(plan.base, plan.parts, plan.mesh, 0, None)
        with jax.set_mesh(plan.mesh):
            results.append(plan.evaluate(*plan.parts.split(params)))
    for key, value in results[0].items():
        np.testing.assert_allclose(value, results[1][key], rtol=1e-5, atol=1e-6, err_msg=key)
