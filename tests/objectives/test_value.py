"""Advantages against slow loops; whitening."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune.objectives import value

RNG = np.random.default_rng(0)
# Ragged rows, a gap in a completion, two completions side by side, an empty row, full ones.
OWN = np.array(
    [
        [0, 0, 1, 1, 1, 1, 0, 0],
        [0, 1, 1, 0, 0, 1, 1, 0],
        [1, 1, 1, 2, 2, 0, 3, 3],
        [0, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 1, 1, 1, 1, 1, 1],
        [0, 0, 0, 0, 0, 0, 0, 1],
    ],
    np.int32,
)
REWARDS, VALUES = RNG.standard_normal((2, *OWN.shape)).astype(np.float32)


def by_hand(gamma, lam):
    """A_t = Σ_k (γ λ)^k δ_{t+k} over the later tokens of the completion, in float64."""
    found = np.zeros(OWN.shape)
    for row in range(len(OWN)):
        for number in range(1, OWN.max() + 1):
            places = [t for t in range(OWN.shape[1]) if OWN[row, t] == number]
            r, v = REWARDS[row, places].astype(float), VALUES[row, places].astype(float)
            later = [*v[1:], 0.0]
            delta = [r[i] + gamma * later[i] - v[i] for i in range(len(places))]
            for i, t in enumerate(places):
                found[row, t] = sum((gamma * lam) ** k * d for k, d in enumerate(delta[i:]))
    return found


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (0.99, 0.0)])
def test_advantages_equal_the_sums(gamma, lam):
    found, returns = value.advantages_and_returns(REWARDS, VALUES, OWN, gamma, lam)
    wanted = by_hand(gamma, lam)
    assert found.dtype == returns.dtype == jnp.float32
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(returns, (wanted + VALUES) * (OWN > 0), rtol=1e-5, atol=1e-5)


def test_values_outside_do_not_matter():
    mad = [np.where(OWN == 0, np.nan, x) for x in (REWARDS, VALUES)]
    for found, wanted in zip(
        value.advantages_and_returns(*mad, OWN),
        value.advantages_and_returns(REWARDS, VALUES, OWN),
        strict=True,
    ):
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("centred", [True, False])
def test_whitening(centred):
    inside = OWN > 0
    found = np.asarray(value.whiten(3 * REWARDS + 1, OWN, centred=centred))
    assert not np.any(found[~inside])
    x = (3 * REWARDS + 1)[inside].astype(np.float64)
    wanted = (x - x.mean()) / np.sqrt(x.var(ddof=1) + 1e-8) + (0 if centred else x.mean())
    np.testing.assert_allclose(found[inside], wanted, rtol=1e-5, atol=1e-5)
    assert np.all(np.isfinite(value.whiten(REWARDS, np.zeros_like(OWN))))


def test_without_a_clip_the_loss_is_the_squared_error():
    weights = (OWN > 0).astype(np.float32)
    loss, metrics = value.value_loss(VALUES, VALUES + 5, REWARDS, weights, None)
    error = ((VALUES - REWARDS) ** 2 * weights).sum()
    np.testing.assert_allclose(loss.sum, error / 2, rtol=1e-5)
    assert loss.weight == weights.sum() and metrics["value/clip_share"].sum == 0
