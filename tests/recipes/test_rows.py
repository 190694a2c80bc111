"""The head runs on targets alone, and reductions over the completions that a row can hold."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxtune
from jaxtune.core.tree import flatten
from jaxtune.parallel.batches import global_batch
from jaxtune.parallel.mesh import batch_shards
from jaxtune.planning import hlo, products
from jaxtune.recipes.assemble import load_parts
from jaxtune.recipes.build import build
from jaxtune.recipes.objectives import OBJECTIVES
from jaxtune.recipes.rows import Rows, rows_of
from jaxtune.recipes.schema.resolve import resolve
from jaxtune.recipes.scores import predictions
from tests.correctness.pair_runs import SEQ, pair_config

pytestmark = pytest.mark.slow
# Those whose loss reads the head, or counts completions; the last has no logits.
ONE, FOUR = {"data": 1, "fsdp": 1}, {"data": 2, "fsdp": 2}
CASES = [
    ("dpo", False, ONE),
    ("dpo", True, FOUR),
    ("kto", False, FOUR),
    ("reward", True, ONE),
]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("rows")


@pytest.fixture(scope="module", params=CASES, ids=str)
def case(request, directory):
    """(plan, its parameters with an adapter that does something, a batch)."""
    name, packing, mesh = request.param
    config = pair_config(directory, "lora", {"name": name}, data={"packing": packing}, mesh=mesh)
    config["peft"] = config["peft"] | {"dropout": 0.0}
    plan = build(resolve(config))
    params = load_parts(plan.base, plan.parts, plan.mesh, 0, None)
    trainable, frozen = plan.parts.split(params)
    keys = iter(jax.random.split(jax.random.key(1), 99))
    trainable = jax.tree.map(lambda x: x + 0.05 * jax.random.normal(next(keys), x.shape), trainable)
    batch = plan.data.stream.batch(0, 4)
    if name == "kto":
        batch["reference_point"] = np.zeros_like(batch["loss_mask"])
    return plan, trainable, frozen, batch


def test_rows_hold_what_their_facts_say(case):
    plan, *_ = case
    rows = rows_of(plan.data, 1, 0)
    seen = [plan.data.stream.row(i) for i in range(plan.data.stream.rows_per_epoch(0))]
    most = max(int((row["loss_mask"] > 0).sum()) for row in seen)
    assert most <= rows.targets < SEQ
    assert max(int(row["completions"].max()) for row in seen) <= rows.completions
    if not plan.config.data.packing:
        assert rows.targets == max(most, *(int(s.targets.max()) for s in plan.data.evals.values()))


def test_losses_metrics_and_gradients_are_those_of_all_tokens(case):
    plan, trainable, frozen, host = case
    batch = global_batch(host, plan.mesh)
    make = OBJECTIVES[plan.config.objective.name].trained
    found, shards = [], batch_shards(plan.mesh)
    for rows in (rows_of(plan.data, shards, 0), Rows(shards)):
        loss = make(plan.config, plan.parts, rows)

        def total(trainable, frozen, batch, loss=loss):
            value, metrics = loss(trainable, frozen, batch, None)
            value = value["preference"] if isinstance(value, dict) else value
            return value.sum, (value, metrics)

        with jax.set_mesh(plan.mesh):
            run = jax.jit(jax.value_and_grad(total, has_aux=True))
            found.append(run(trainable, frozen, batch))
    (one, grads), (two, wanted) = found
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), one, two)
    for path, grad in flatten(grads).items():
        if grad is not None:
            scale = float(np.abs(flatten(wanted)[path]).max())
            np.testing.assert_allclose(
                grad, flatten(wanted)[path], rtol=0, atol=1e-5 * scale, err_msg=path
            )


@pytest.mark.parametrize("case", [CASES[0], CASES[3]], indirect=True, ids=str)
def test_a_plan_counts_the_head_as_often_as_it_runs(case):
    plan, *_ = case
    targets = rows_of(plan.data, 1, 0).targets
    planned = jaxtune.plan(plan.config.to_dict())
    model = plan.parts.config
    if plan.config.objective.name == "reward":  # no head over tokens
        assert planned["bytes_per_device"]["logits"] == 0
        return
    assert planned["bytes_per_device"]["logits"] == 2 * 4 * targets * model.vocab_size * 4
    absent = {k: v for k, v in plan.config.to_dict().items() if k != "eval"}
    absent["data"] |= {"train": [{"format": "preference"}], "eval": []}
    unknown = jaxtune.plan(absent)
    assert unknown["bytes_per_device"]["logits"] == 2 * 4 * SEQ * model.vocab_size * 4
    # A frozen head: forwards, the gradient of its input, and forwards for the reference.
    saved = 4 * (SEQ - targets) * 3 * 2 * model.hidden_size * model.vocab_size
    assert unknown["flops_per_step"] - planned["flops_per_step"] == saved > 0
    with jax.set_mesh(plan.mesh):
        program = plan.step.lower(*plan.abstract_arguments()).compile().as_text()
    assert planned["flops_per_step"] == products.flops(hlo.parse(program))


@pytest.mark.parametrize("case", CASES[:3], indirect=True, ids=str)
def test_logits_are_made_of_targets_alone_and_none_is_lost_unseen(case):
    plan, trainable, frozen, batch = case
    loss = OBJECTIVES[plan.config.objective.name].trained(
        plan.config, plan.parts, rows := rows_of(plan.data, 1, 0)
    )
    vocab = plan.parts.config.vocab_size
    with jax.set_mesh(plan.mesh):
        program = str(jax.make_jaxpr(lambda t: loss(t, frozen, batch, None)[0])(trainable))
    assert f"f32[4,{rows.targets},{vocab}]" in program and f"f32[4,{SEQ},{vocab}]" not in program
    most = int((batch["loss_mask"] > 0).sum(axis=1).max())
    params = jax.tree.map(
        lambda a, b: b if a is None else a, trainable, frozen, is_leaf=lambda x: x is None
    )
    arrays = {name: jnp.asarray(array) for name, array in batch.items()}
    for allowed in (most, most - 1):
        with jax.set_mesh(plan.mesh):
            scores = predictions(
                plan.parts.config, plan.parts.method, params, dict(arrays), most=allowed
            ).scores
        lost = np.isnan(scores.logprobs).any(axis=1)
        assert lost.tolist() == ((batch["loss_mask"] > 0).sum(axis=1) > allowed).tolist()
