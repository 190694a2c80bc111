"""Means over all held-out targets, however they were batched."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune.core.weighted import weighted
from jaxtune.evaluate.loss import loss_sums, perplexity
from jaxtune.parallel.mesh import make_mesh


@jax.jit
def step(trainable, frozen, batch):
    del trainable, frozen
    return weighted(batch["x"], batch["loss_mask"]), {
        "accuracy": weighted(batch["x"] > 0, batch["loss_mask"])
    }


def batches(rows: np.ndarray, weights: np.ndarray, size: int):
    for start in range(0, len(rows), size):
        yield {"x": rows[start : start + size], "loss_mask": weights[start : start + size]}


@pytest.mark.parametrize("size", [1, 3, 8, 24])
def test_the_mean_is_over_tokens_and_not_over_batches(size):
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((24, 4)).astype(np.float32)
    weights = (rng.random((24, 4)) < 0.3).astype(np.float32)
    weights[:3] = 0  # batches of one and of three without a target
    result = loss_sums(step, {}, {}, batches(rows, weights, size), make_mesh({})).means()
    expected = float((rows * weights).sum(dtype=np.float64) / weights.sum())
    assert result["loss"] == pytest.approx(expected, rel=1e-6)
    assert result["accuracy"] == pytest.approx(((rows > 0) * weights).sum() / weights.sum())
    assert result["perplexity"] == pytest.approx(math.exp(expected), rel=1e-6)
    assert result["tokens"] == weights.sum()


def test_many_batches_do_not_lose_the_small_ones():
    """Sums are kept in float64 on the host: 1 and 1e-8 two hundred times."""
    parts = [
        {"x": jnp.full((1, 1), 1e-8 if i else 1.0), "loss_mask": jnp.ones((1, 1))}
        for i in range(201)
    ]
    host = [{k: np.asarray(v) for k, v in part.items()} for part in parts]
    result = loss_sums(step, {}, {}, host, make_mesh({})).means()
    assert result["loss"] == pytest.approx((1 + 200e-8) / 201, rel=1e-7)


@pytest.mark.parametrize("scale", [1.0, 0.05])
def test_several_sources_are_pooled_by_their_weights(scale):
    """Weights may be fractions, even of less than one in all; tokens are counted, not weighed."""
    rng = np.random.default_rng(1)
    rows = rng.standard_normal((5, 4)).astype(np.float32)
    weights = (scale * rng.choice([0.0, 0.25, 1.0, 0.5], (5, 4))).astype(np.float32)
    mesh = make_mesh({})

    def measured(chosen):
        return loss_sums(step, {}, {}, batches(rows[chosen], weights[chosen], 2), mesh)

    parts = [measured(slice(0, 2)), measured(slice(2, 5)), measured(slice(0, 0))]
    result = (parts[0] + parts[1] + parts[2]).means()
    expected = float((rows * weights).sum(dtype=np.float64) / weights.sum(dtype=np.float64))
    assert result["loss"] == pytest.approx(expected, rel=1e-6)
    assert result["perplexity"] == pytest.approx(math.exp(expected), rel=1e-6)
    assert result["accuracy"] == pytest.approx(((rows > 0) * weights).sum() / weights.sum())
    assert result["tokens"] == (weights > 0).sum()
    assert math.isnan(parts[2].means()["loss"])


def test_perplexity_of_a_hopeless_model_is_infinite():
    assert perplexity(0.0) == 1.0
    assert perplexity(1e4) == math.inf
