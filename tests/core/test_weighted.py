"""Sums with their weights."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxtune.core.weighted import Weighted, weighted

PAIRS = st.tuples(st.floats(-5, 5), st.sampled_from([0.0, 0.5, 1.0]))
ROWS = st.lists(st.lists(PAIRS, min_size=3, max_size=3), min_size=1, max_size=4)


@settings(deadline=None, max_examples=30)
@given(ROWS)
def test_the_mean_is_over_all_and_not_of_means(rows):
    parts = [weighted(*(jnp.array(column) for column in zip(*row, strict=True))) for row in rows]
    total = sum(parts[1:], parts[0])
    flat = [pair for row in rows for pair in row]
    weight = sum(w for _, w in flat)
    expected = sum(v * w for v, w in flat) / weight if weight else 0.0
    np.testing.assert_allclose(total.mean(), expected, rtol=1e-5, atol=1e-5)


def test_nothing_weighed_is_zero_and_not_nan():
    """0/0 hides a NaN in metrics: https://github.com/hiyouga/LLaMA-Factory/issues/2916."""
    none = weighted(jnp.array([jnp.nan, jnp.inf]), jnp.zeros(2))
    assert (none.sum, none.weight, none.mean()) == (0.0, 0.0, 0.0)
    gradient = jax.grad(lambda x: weighted(x, jnp.zeros(2)).mean())(jnp.array([1.0, jnp.inf]))
    assert np.array_equal(gradient, [0.0, 0.0])


def test_sums_are_float32():
    values = jnp.full((4096,), 1.0, jnp.bfloat16)
    assert weighted(values, jnp.ones(4096, jnp.bfloat16)) == Weighted(4096.0, 4096.0)
