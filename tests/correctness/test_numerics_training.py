"""Whole runs in bfloat16, one a method: C15, C19, C20, C32, C33, and frozen means frozen."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxtune
from jaxtune.checkpoints.runs import RunCheckpoints
from jaxtune.cli.main import main
from jaxtune.core.errors import RequestError
from jaxtune.core.tree import flatten, size, without_holes
from jaxtune.core.weighted import Weighted
from jaxtune.peft.method import FIXED, FROZEN, TRAINED, labels
from jaxtune.recipes import build, sft
from jaxtune.recipes.assemble import load_parts
from jaxtune.recipes.evaluation.evaluate import evaluate
from jaxtune.recipes.schema.resolve import resolve
from tests.correctness.runs import OVERRIDES, base_params, run_config
from tests.correctness.small import DISTINCT, examples

pytestmark = pytest.mark.slow

TIMES = ("tokens_per_second", "step_seconds")


@pytest.fixture(scope="module")
def run_of(tmp_path_factory):
    """method → (directory, Result) of a run with a bfloat16 base; each is run once."""
    known = {}

    def run(name: str):
        if name not in known:
            directory = tmp_path_factory.mktemp(name)
            config = run_config(directory, name, model={"dtype": "bfloat16"})
            config.data.eval = []
            known[name] = directory / "run", jaxtune.train(config, directory / "run")
        return known[name]

    return run


def held_arrays(workdir: Path, item: str) -> dict:
    """{path: metadata} of what the newest checkpoint stores."""
    saved = RunCheckpoints(workdir / "checkpoints")
    try:
        found = saved.manager.item_metadata(saved.latest())[item]
    finally:
        saved.close()
    return flatten(dict(found.tree if hasattr(found, "tree") else found))


@pytest.mark.parametrize("name", [*DISTINCT, "partial"])
def test_frozen_leaves_keep_every_bit_and_trained_ones_move(name, run_of):
    """`optax.masked` moves a frozen leaf by its raw gradient; and see C19, C20."""
    workdir, result = run_of(name)
    lm = jaxtune.load(workdir, dtype="bfloat16")
    _, base = base_params("bfloat16")
    before, kinds = flatten(base), flatten(labels(lm.method, lm.params))
    after = flatten(lm.params)
    plan = build.build(resolve(json.loads((workdir / "config.json").read_text())))
    start = flatten(load_parts(plan.base, plan.parts, plan.mesh, 0, None))
    for path, leaf in after.items():
        if kinds[path] == FROZEN:
            assert leaf.dtype == jnp.bfloat16
            assert np.array_equal(leaf, before[path]), path
        else:
            assert leaf.dtype == jnp.float32
            moved = not np.array_equal(leaf, start[path])
            assert moved == (kinds[path] == TRAINED), path
    frozen = {path for path, kind in kinds.items() if kind == FROZEN}
    unfrozen = {"full": ".*", "partial": "blocks/attn/.*|final_norm/scale"}.get(name, "(?!)")
    assert frozen == {path for path in before if not re.fullmatch(unfrozen, path)}

    # C19: a share of unchanged parameters near one means that updates round away
    rows = [row for row in result.history if "loss" in row]
    assert len(rows) == 4 and all(row["unchanged"] < 0.1 for row in rows[1:])
    assert all(np.isfinite(row[key]) for row in rows for key in ("loss", "grad_norm"))

    # the checkpoint holds the method's leaves and two moments of the trained ones, in float32
    model, state = held_arrays(workdir, "model"), held_arrays(workdir, "state")
    trained = {path for path, kind in kinds.items() if kind == TRAINED}
    fixed = {path for path, kind in kinds.items() if kind == FIXED}
    assert set(model) == {f"trainable/{p}" for p in trained} | {f"fixed/{p}" for p in fixed}
    arrays = {path: held for path, held in state.items() if held.shape}
    moments = {path: held for path, held in arrays.items() if path.startswith("opt_state")}
    for held in (*model.values(), *moments.values()):
        assert np.dtype(held.dtype) == np.float32
    count = sum(int(np.prod(held.shape)) for held in moments.values())
    assert count == 2 * sum(after[path].size for path in trained)
    assert result.summary["parameters"]["trainable"] * 2 == count
    assert set(arrays) - set(moments) == {"key"}


@pytest.fixture(scope="module")
def first_losses(tmp_path_factory):
    """method → the evaluation, twice, of what a run begins with, in float32."""
    directory = tmp_path_factory.mktemp("first")

    @functools.cache
    def losses(name: str):
        plan = build.build(resolve(run_config(directory, name)))
        params = load_parts(plan.base, plan.parts, plan.mesh, 0, None)
        with jax.set_mesh(plan.mesh):
            return [plan.evaluate(*plan.parts.split(params)) for _ in range(2)]

    return losses


@pytest.mark.parametrize("name", [n for n in DISTINCT if n not in ("full", "prompt", "prefix")])
def test_c20_a_run_begins_as_its_base_and_evaluates_without_dropout(name, first_losses):
    """CORRECTNESS C20, through what a run does at its start; logits are in tests/peft."""
    base, _ = first_losses("full")
    first, second = first_losses(name)
    assert first == second
    assert first["eval/tokens"] == base["eval/tokens"] > 0
    np.testing.assert_allclose(first["eval/loss"], base["eval/loss"], rtol=1e-6)


def test_c19_updates_that_round_away_are_a_metric(tmp_path):
    """bf16 moments and adapters stood still: https://github.com/keras-team/keras-hub/issues/2629."""
    config = run_config(tmp_path, "lora", total_steps=2, optim={"lr": 1e-12, "weight_decay": 0.0})
    rows = [r for r in jaxtune.train(config, tmp_path / "run").history if "loss" in r]
    # of A and B only B moves, from zero, where every step counts
    a, b = (
        size(
            [
                leaf
                for path, leaf in flatten(jaxtune.load(tmp_path / "run").params).items()
                if path.endswith(f"lora/{name}")
            ]
        )
        for name in "ab"
    )
    assert rows[0]["unchanged"] == pytest.approx(a / (a + b), abs=0.01)


def test_c32_the_same_seed_gives_the_same_bits(tmp_path):
    """With dropout, packing, shuffling and two micro-batches."""
    results = []
    for place, seed in (("one", 0), ("two", 0), ("three", 1)):
        (tmp_path / place).mkdir()
        config = run_config(
            tmp_path / place, "lora", seed=seed, grad_accum=2, batch_size=4, data={"packing": True}
        )
        # the base is another one with another seed; its weights are not the question here
        result = jaxtune.train(config, tmp_path / place / "run")
        params = flatten(jaxtune.load(tmp_path / place / "run", dtype="float32").params)
        rows = [{k: v for k, v in row.items() if k not in TIMES} for row in result.history]
        results.append((rows, params))
    (rows, params), (again, same), (other, _) = results
    assert rows == again
    assert all(np.array_equal(leaf, same[path]) for path, leaf in params.items())
    assert rows[0]["loss"] != other[0]["loss"]


MARK = 96  # a token that stands in the fifth example alone
LEAF = "blocks/mlp/up_proj/lora/b"


def poisoned(make_loss):
    """The loss, whose gradient for LEAF is NaN where the batch holds MARK."""

    def make(*args):
        inner = make_loss(*args)

        def loss(trainable, frozen, batch, key):
            found, metrics = inner(trainable, frozen, batch, key)
            bad = jnp.any(batch["input_ids"] == MARK)
            extra = jnp.where(bad, jnp.nan, 0.0) * jnp.sum(flatten(trainable)[LEAF])
            return Weighted(found.sum + extra, found.weight), metrics

        return loss

    return make


@pytest.mark.parametrize("every", [1, 2])
def test_c33_a_step_that_is_not_finite_stops_the_run(tmp_path, monkeypatch, every):
    """The step and the parameter are named, and no checkpoint holds what came of it."""
    config = run_config(tmp_path, "lora", batch_size=2)
    rows = [
        {"input_ids": ids.tolist(), "loss_mask": [int(m) for m in mask]}
        for ids, mask in examples([5, 9, 7, 11, 6, 8, 10, 4], vocab=MARK)
    ]
    rows[4]["input_ids"][2] = MARK
    source = tmp_path / "marked.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config.data.train[0]["source"] = f"jsonl:{source}"
    config.data.shuffle = False
    config.data.eval = []
    config.checkpoint.every_steps = every
    config.log.every_steps = 4
    path, workdir = tmp_path / "config.json", tmp_path / "run"
    path.write_text(json.dumps(config.to_dict()))
    arguments = ["train", f"--config={path}", f"--workdir={workdir}"]

    with monkeypatch.context() as patch:
        patch.setattr(sft, "sft_loss", poisoned(sft.sft_loss))
        assert main(arguments) == 1
    summary = json.loads((workdir / "summary.json").read_text())
    assert summary["stop_reason"] == "non_finite"
    assert summary["step"] == 3
    assert "step 3" in summary["detail"] and LEAF in summary["detail"]
    steps = [int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit()]
    assert max(steps) == 2
    params = flatten(jaxtune.load(workdir, dtype="float32").params)
    assert all(np.all(np.isfinite(leaf)) for leaf in params.values())
    text = (workdir / "metrics.jsonl").read_text()
    assert "NaN" not in text and "Infinity" not in text

    assert main(arguments) == 0  # with the cause removed the run goes on from its checkpoint
    summary = json.loads((workdir / "summary.json").read_text())
    assert (summary["stop_reason"], summary["step"]) == ("finished", 4)


TIED = {"overrides": OVERRIDES | {"tie_embeddings": True}}


def test_c15_adapting_a_tied_head_is_refused(tmp_path):
    """The adapter would be lost in a tied export: https://github.com/huggingface/peft/issues/2018."""
    peft = {"method": "lora", "rank": 2, "targets": ["q_proj", "lm_head"]}
    with pytest.raises(RequestError, match=r"peft.targets: 'lm_head' is tied to the embedding"):
        jaxtune.train(run_config(tmp_path, peft, model=TIED), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_c15_tied_embeddings_train_reload_export_and_untie(tmp_path):
    """https://github.com/huggingface/transformers/issues/45127."""
    peft = {"method": "lora", "rank": 2, "targets": ["q_proj"], "train": ["embed/.*"]}
    first = tmp_path / "tied"
    result = jaxtune.train(run_config(tmp_path, peft, model=TIED), first)
    lm = jaxtune.load(first, dtype="float32")
    _, base = base_params(overrides=TIED["overrides"])
    table = lm.params["embed"]["embedding"]
    assert "lm_head" not in lm.params
    assert not np.array_equal(table, base["embed"]["embedding"])
    # reloaded = in memory, by the loss that the run itself measured at its end
    report = evaluate(workdir=first)
    last = [row["eval/loss"] for row in result.history if "eval/loss" in row][-1]
    np.testing.assert_allclose(report["loss"], last, rtol=1e-6)
    ids = np.stack([ids for ids, _ in examples([9, 9])])
    lm.save(tmp_path / "hf")
    exported = jaxtune.load(tmp_path / "hf", dtype="float32")
    assert exported.config.tie_embeddings
    np.testing.assert_allclose(exported.logits(ids), lm.logits(ids), rtol=1e-4, atol=1e-5)

    # untied: the head is a matrix of its own that starts as the table, and can be adapted
    head = {"method": "lora", "rank": 2, "targets": ["lm_head"]}
    model = {"path": str(tmp_path / "hf"), "preset": None, "overrides": {"tie_embeddings": False}}
    config = run_config(tmp_path, head)
    config.model = model | {"dtype": "float32"}
    jaxtune.train(config, tmp_path / "untied")
    untied = jaxtune.load(tmp_path / "untied", dtype="float32")
    assert np.array_equal(untied.params["embed"]["embedding"], table)
    assert np.array_equal(untied.params["lm_head"]["kernel"], np.asarray(table).T)
    assert np.any(untied.params["lm_head"]["lora"]["b"])
    untied.save(tmp_path / "again")
    again = jaxtune.load(tmp_path / "again", dtype="float32")
    assert not again.config.tie_embeddings
    np.testing.assert_allclose(again.logits(ids), untied.logits(ids), rtol=1e-4, atol=1e-5)


def test_c34_a_key_of_another_method_is_refused_by_name(tmp_path):
    """Flags silently ignored: https://github.com/huggingface/trl/issues/6023.

    tests/recipes/test_schema.py goes through the whole table; test_sweep.py has the directories.
    """
    config = run_config(tmp_path, {"method": "ia3", "rank": 8})
    with pytest.raises(RequestError, match=r"peft\.rank"):
        jaxtune.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_without_holes_lists_the_gradients_in_the_order_of_the_step(tmp_path):
    """The name of a bad parameter is found by its number among the trained leaves."""
    plan = build.build(resolve(run_config(tmp_path, "lora")))
    trained, _ = plan.parts.split(plan.parts.shapes)
    leaves = jax.tree_util.tree_flatten_with_path(trained)[0]
    paths = ["/".join(str(key.key) for key in path) for path, _ in leaves]
    assert paths == list(without_holes(trained))
