"""A run on a quantised base, and what is made of it afterwards."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

import jaxtune
from jaxtune.core.errors import RequestError
from jaxtune.core.quantize import dense_tree
from jaxtune.core.tree import flatten
from jaxtune.parallel.mesh import make_mesh
from jaxtune.recipes.evaluation.evaluate import evaluate
from jaxtune.recipes.export import export
from jaxtune.recipes.runs import open_base, open_run
from jaxtune.recipes.schema.resolve import resolve
from tests.correctness import interrupts
from tests.correctness.interrupts import Workbench
from tests.correctness.tiny_runs import arrays, assert_same_run, rows, run_config

pytestmark = pytest.mark.slow

IDS = np.arange(1, 17)[None]
KERNEL = "blocks/mlp/down_proj/kernel"


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> dict:
    return run_config(
        tmp_path_factory.mktemp("data"),
        model__quantize="nf4",
        model__overrides__hidden_size=128,
        model__overrides__intermediate_size=192,
        total_steps=6,
        grad_accum=1,
        eval__every_steps=None,
    )


@pytest.fixture(scope="module")
def bench() -> Workbench:
    return Workbench()


@pytest.fixture(scope="module")
def run(config, bench, tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("run") / "run"
    assert bench.train(config, workdir).summary["stop_reason"] == "finished"
    return workdir


@pytest.fixture(scope="module")
def lm(run) -> jaxtune.LanguageModel:
    return jaxtune.load(run, dtype="float32")


def logits(lm) -> np.ndarray:
    return np.asarray(lm.logits(IDS))


def test_the_adapter_learns_and_no_checkpoint_holds_the_base(run):
    assert rows(run)[-2]["loss"] < rows(run)[0]["loss"] and rows(run)[-2]["unchanged"] < 0.01
    held = arrays(run)
    model = {path for path in held if path.startswith("model/")}
    assert len(model) == 14 and all("/lora/" in path for path in model)
    assert not any("codes" in path or "absmax" in path for path in held)
    trained = sum(held[path].nbytes for path in model)
    assert sum(leaf.nbytes for leaf in held.values()) < 3 * trained + 1000


def test_an_interrupted_run_continues_to_the_same_bits(run, config, bench, tmp_path):
    with interrupts.after_the_save(3):
        bench.train(config, tmp_path / "run")
    bench.train(config, tmp_path / "run")
    assert_same_run(tmp_path / "run", run)


def test_a_loaded_run_keeps_its_base_and_measures_the_same(run, lm):
    leaves = flatten(lm.params)
    assert lm.config.quantize == "nf4" and leaves[f"{KERNEL}/codes"].dtype == np.uint8
    assert evaluate(workdir=run)["loss"] == pytest.approx(rows(run)[-1]["eval/loss"], rel=1e-5)
    lm.generate([[1, 2, 3]], max_new_tokens=4)
    whole = jaxtune.load(run, dtype="float32", quantize="none")
    assert KERNEL in flatten(whole.params)
    assert 1e-4 < np.abs(logits(whole) - logits(lm)).max() < 0.5


def test_merged_and_exported_it_computes_the_same(run, lm, tmp_path):
    merged = lm.merge("default")
    assert merged.config.quantize == "none"
    np.testing.assert_allclose(logits(merged), logits(lm), atol=1e-5)
    assert export(run, "hf", tmp_path / "hf")["max_logit_error"] < 1e-5
    assert export(run, "peft", tmp_path / "peft")["max_logit_error"] < 1e-5
    written = jaxtune.load(tmp_path / "hf", dtype="float32")
    np.testing.assert_allclose(
        flatten(written.params)[KERNEL], flatten(merged.params)[KERNEL], atol=1e-6
    )
    # the adapter stands beside a quantised base as it did in training
    nothing, half = lm.use({"default": 0.0}), lm.use({"default": 0.5})
    np.testing.assert_allclose(logits(nothing), logits(lm.use(None)), atol=1e-5)
    assert np.abs(logits(half) - logits(lm)).max() > 1e-3


def test_a_run_as_base_is_what_it_computed_and_can_be_quantised_again(run, lm, config):
    section = config["model"] | {"preset": None, "path": str(run), "overrides": {}}
    own = {"codes": "int8", "absmax": "bfloat16"}
    wanted = flatten(lm.method.merge(lm.params))
    for kind in ("none", "int8"):
        base = open_base(resolve({**config, "model": section | {"quantize": kind}}).model, 0)
        assert base.config.quantize == kind
        mesh = make_mesh({}, jax.devices()[:1])
        leaves = base.load(lambda path: own.get(path.split("/")[-1], "float32"), mesh, kind)
        kernel = flatten(dense_tree(leaves, "float32"))[KERNEL]
        np.testing.assert_allclose(kernel, wanted[KERNEL], atol=1e-6 if kind == "none" else 2e-3)
    assert open_run(run).base.config.quantize == "nf4"


def test_a_full_run_is_quantised_when_it_is_loaded(config, tmp_path):
    changed = {**config, "model": config["model"] | {"quantize": "none"}, "total_steps": 1}
    changed |= {"peft": {"method": "full"}, "optim": {"lr": 1e-3}}
    jaxtune.train(changed, tmp_path / "run")
    whole = jaxtune.load(tmp_path / "run", dtype="float32")
    small = jaxtune.load(tmp_path / "run", dtype="float32", quantize="int8")
    assert small.config == dataclasses.replace(whole.config, quantize="int8")
    assert 1e-6 < np.abs(logits(small) - logits(whole)).max() < 0.02


def test_requests_that_cannot_be_had(config, run):
    with pytest.raises(RequestError, match="none, int8, nf4") as error:
        jaxtune.load(run, quantize="int3")
    assert error.value.key == "quantize"
    changed = {**config, "peft": config["peft"] | {"train": [".*/q_proj/kernel"]}}
    with pytest.raises(RequestError, match="q_proj/kernel") as error:
        jaxtune.train(changed, run.parent / "other")
    assert error.value.key == "peft.train" and not (run.parent / "other").exists()
