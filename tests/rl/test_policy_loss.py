"""C1, C2, C24: the losses of GRPO and PPO through the model, against sums written out by hand."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import numpy as np
import pytest

from jaxtune.core.tree import flatten
from jaxtune.models import decoder
from jaxtune.models.config import ModelConfig
from jaxtune.parallel.batches import global_batch
from jaxtune.parallel.mesh import batch_shards, make_mesh
from jaxtune.recipes import online
from jaxtune.recipes.base import BASE
from jaxtune.recipes.objectives import OBJECTIVES
from jaxtune.recipes.reference import base_of
from jaxtune.recipes.rows import Rows
from jaxtune.recipes.schema.resolve import resolve
from jaxtune.training.step import mean_loss, summed_gradients, terms, unit_weight
from tests.correctness.small import CONFIG, small
from tests.rl.tiny import run_config

pytestmark = pytest.mark.slow

ROWS, WIDTH, NEW, HEAT = 8, 12, 8, 0.7
# Prompt and completion lengths; the sixth was cut off, the last is no target at all.
LENGTHS = [(2, 3), (1, 8), (3, 5), (2, 1), (4, 8), (1, 6), (2, 4), (3, 0)]
VARIANTS = ("grpo", "dr_grpo", "dapo", "gspo", "rloo", "reinforce++")
CASES = (*VARIANTS, "ppo")


@functools.cache
def objective_of(case: str, tmp: Any) -> Any:
    """The resolved config of a case, with every term that it can have."""
    name = "ppo" if case == "ppo" else "grpo"
    changes = {} if case == "ppo" else {"objective__variant": case}
    if case in ("grpo", "dapo", "ppo"):
        changes |= {"objective__entropy_coef": 0.02, "objective__clip_dual": 1.5}
    if case in ("grpo", "dr_grpo", "ppo"):
        exact = case != "grpo"
        changes |= {
            "objective__kl_coef": 0.1,
            "objective__kl_estimator": "exact" if exact else "k3",
            "objective__kl_in": "loss",
        }
    return resolve(
        run_config(tmp, name, objective__temperature=HEAT, objective__max_new_tokens=NEW, **changes)
    )


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("rl")


def model_of(case: str) -> ModelConfig:
    return CONFIG if case != "ppo" else ModelConfig(**vars(CONFIG) | {"score_head": True})


def rollouts(config: Any) -> dict[str, np.ndarray]:
    """Rows with random numbers in every key; ratios on both sides of the clip."""
    rng = np.random.default_rng(3)
    batch = online.padding(config, None, ROWS, 0)
    batch = {name: np.zeros((ROWS, WIDTH), array.dtype) for name, array in batch.items()}
    for row, (prompt, new) in enumerate(LENGTHS):
        size, inside = prompt + new, slice(prompt, prompt + new)
        batch["input_ids"][row, :size] = rng.integers(1, 97, size)
        batch["segment_ids"][row, :size] = 1
        batch["positions"][row, :size] = np.arange(size)
        batch["loss_mask"][row, inside] = batch["completions"][row, inside] = 1
        batch["advantages"][row, inside] = rng.normal()
        for name in ("old_logprobs", "ref_logprobs"):
            if name in batch:
                batch[name][row, inside] = -4.57 + rng.normal(size=new)
        for name in ("old_values", "returns"):
            if name in batch:
                batch[name][row, inside] = rng.normal(size=new)
        if "kl_coef" in batch:
            batch["kl_coef"][row] = config.objective.kl_coef
    return batch


def expected_loss(case: str, config: Any, batch: dict, model: Any) -> float:
    """The loss of the batch, a sum over its tokens one after the other."""
    o = config.objective
    arguments = (model.parts.config, model.method, model.params)
    hidden = decoder.hidden_states(*arguments, batch).states
    logits = np.asarray(decoder.logits(*arguments, hidden), np.float64) / HEAT
    values = np.asarray(decoder.scores(*arguments, hidden)) if case == "ppo" else None
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    if o.kl_estimator == "exact":
        base = (model.parts.config, BASE, base_of(model.parts.config, model.params))
        logq = np.asarray(
            decoder.logits(*base, decoder.hidden_states(*base, batch).states), np.float64
        )
        logq = logq / HEAT - np.log(np.exp(logq / HEAT).sum(-1, keepdims=True))
    sequences, entropies, errors = [], [], []
    for row, (prompt, new) in enumerate(LENGTHS):
        if not new:
            continue
        places = range(prompt, prompt + new)
        u = [
            logp[row, t - 1, batch["input_ids"][row, t]] - batch["old_logprobs"][row, t]
            for t in places
        ]
        if case == "gspo":
            u = [sum(u) / new] * new
        if case == "rloo":
            u = [sum(u)] * new
        losses = []
        for i, t in enumerate(places):
            advantage = float(batch["advantages"][row, t])
            ratio = math.exp(u[i])
            held = min(max(ratio, 1 - o.clip_low), 1 + o.clip_high)
            loss = -min(ratio * advantage, held * advantage)
            if o.clip_dual is not None and advantage < 0:
                loss = min(loss, -o.clip_dual * advantage)
            if o.kl_estimator == "exact":
                p = np.exp(logp[row, t - 1])
                loss += o.kl_coef * (p * (logp[row, t - 1] - logq[row, t - 1])).sum()
            elif o.kl_coef and o.kl_in == "loss":
                v = batch["ref_logprobs"][row, t] - logp[row, t - 1, batch["input_ids"][row, t]]
                loss += o.kl_coef * (math.exp(v) - 1 - v)
            losses.append(loss)
            entropies.append(-(np.exp(logp[row, t - 1]) * logp[row, t - 1]).sum())
            if values is not None:
                v, old = values[row, t - 1], batch["old_values"][row, t]
                near = min(max(v, old - o.value_clip), old + o.value_clip)
                goal = batch["returns"][row, t]
                errors.append(max((v - goal) ** 2, (near - goal) ** 2) / 2)
        sequences.append(losses)
    tokens = sum(map(len, sequences))
    loss = {
        "sequence": np.mean([np.mean(losses) for losses in sequences]),
        "token": sum(map(sum, sequences)) / tokens,
        "constant": sum(map(sum, sequences)) / (len(sequences) * NEW),
    }[o.get("normaliser", "token")]
    loss -= o.entropy_coef * np.mean(entropies)
    return float(loss + (o.value_coef * np.mean(errors) if errors else 0.0))


def forward(case: str, tmp: Any) -> tuple[float, dict[str, float]]:
    """(loss, metrics) of the batch."""
    config = objective_of(case, tmp)
    model = small("full" if case == "grpo" else "lora", model_of(case))
    loss = OBJECTIVES[config.objective.name].trained(config, model.parts, Rows(1))

    def run(trainable, frozen, batch):
        found, metrics = loss(trainable, frozen, batch, None)
        return mean_loss(terms(found)), {name: value.mean() for name, value in metrics.items()}

    found, means = jax.jit(run)(*model.parts.split(model.params), rollouts(config))
    return float(found), {name: float(value) for name, value in means.items()}


@functools.cache
def gradients(case: str, tmp: Any, count: int, sizes: tuple = ()):
    """(loss, {path: gradient}) of the batch in so many micro-batches on a mesh."""
    config, mesh = objective_of(case, tmp), make_mesh(dict(sizes))
    model = small("full" if case == "grpo" else "lora", model_of(case), mesh)
    loss = OBJECTIVES[config.objective.name].trained(config, model.parts, Rows(batch_shards(mesh)))

    def run(trainable, frozen, batch):
        losses, metrics, grads = summed_gradients(
            loss, trainable, frozen, batch, jax.random.key(0), count
        )
        weight = unit_weight(losses)
        means = {name: value.mean() for name, value in metrics.items()}
        return mean_loss(losses), means, jax.tree.map(lambda g: g / weight, grads)

    with jax.set_mesh(mesh):
        batch = global_batch(rollouts(config), mesh)
        found, means, grads = jax.jit(run)(*model.parts.split(model.params), batch)
    flat = {path: np.asarray(g) for path, g in flatten(grads).items() if g is not None}
    return float(found), {name: float(value) for name, value in means.items()}, flat


@pytest.mark.parametrize("case", CASES)
def test_the_loss_is_the_sum_written_out_by_hand(case, directory):
    config = objective_of(case, directory)
    model = small("full" if case == "grpo" else "lora", model_of(case))
    expected = expected_loss(case, config, rollouts(config), model)
    found, means = forward(case, directory)
    np.testing.assert_allclose(found, expected, rtol=2e-5)
    assert 0 < means["clip_share"] < 1


@pytest.mark.parametrize("case", ["grpo", "ppo"])
def test_micro_batches_change_neither_loss_nor_gradient(case, directory):
    assert_same(gradients(case, directory, 1), gradients(case, directory, 4), 1e-6)


@pytest.mark.parametrize(
    ("case", "sizes"), [("grpo", {"fsdp": 2}), ("ppo", {"data": 2, "fsdp": 2, "tensor": 2})]
)
def test_meshes_change_neither_loss_nor_gradient(case, sizes, directory):
    found = gradients(case, directory, 4 if case == "grpo" else 2, tuple(sizes.items()))
    assert_same(gradients(case, directory, 4), found, 1e-5)


def assert_same(one, other, tolerance: float) -> None:
    np.testing.assert_allclose(other[0], one[0], rtol=tolerance)
    for name, value in one[1].items():
        np.testing.assert_allclose(other[1][name], value, rtol=1e-5, atol=1e-6, err_msg=name)
    for path, leaf in one[2].items():
        scale = np.abs(leaf).max()
        np.testing.assert_allclose(
            other[2][path], leaf, rtol=tolerance, atol=tolerance * scale, err_msg=path
        )
