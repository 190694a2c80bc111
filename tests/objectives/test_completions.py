"""Sums and values of completions, against loops over the tokens."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune.objectives import completions as c

COUNT = 4
OWN = np.array(
    [
        [0, 0, 1, 1, 1, 0, 2, 2, 0],
        [0, 1, 0, 2, 2, 2, 3, 4, 4],  # two pairs, nothing between completions
        [0, 0, 0, 0, 0, 0, 0, 0, 0],
        [1, 2, 0, 0, 3, 3, 0, 0, 0],  # the second pair has no rejected side
    ],
    np.int32,
)
VALUES = np.random.default_rng(0).standard_normal(OWN.shape).astype(np.float32)


def by_hand(reduce, values=VALUES):
    """reduce(list of values) of each completion, 0 without tokens."""
    found = np.zeros((len(OWN), COUNT))
    for row in range(len(OWN)):
        for number in range(1, COUNT + 1):
            mine = [v for v, own in zip(values[row], OWN[row], strict=True) if own == number]
            if mine:
                found[row, number - 1] = reduce(mine)
    return found


@pytest.mark.parametrize(
    ("function", "reduce"),
    [(c.totals, sum), (c.averages, np.mean)],
)
def test_sums_and_means(function, reduce):
    found = function(jnp.asarray(VALUES), OWN, COUNT)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, by_hand(reduce), rtol=1e-5, atol=1e-6)
    # Half-precision values are added in float32.
    assert function(jnp.asarray(VALUES, jnp.bfloat16), OWN, COUNT).dtype == jnp.float32


def test_lengths_and_presence():
    np.testing.assert_array_equal(c.lengths(OWN, COUNT), by_hand(len))
    np.testing.assert_array_equal(c.present(OWN, COUNT), by_hand(len) > 0)


def test_values_that_nobody_asked_for_may_be_mad():
    mad = np.where(OWN == 0, np.nan, VALUES)
    value, grad = jax.value_and_grad(lambda v: c.totals(v, OWN, COUNT).sum())(jnp.asarray(mad))
    np.testing.assert_allclose(value, VALUES[OWN > 0].sum(), rtol=1e-5)
    np.testing.assert_array_equal(grad, OWN > 0)


def test_a_value_on_each_token_is_read_exactly_and_put_back():
    of = np.random.default_rng(1).standard_normal((len(OWN), COUNT)).astype(np.float32)
    of *= by_hand(len) > 0
    on_tokens = c.spread(jnp.asarray(of), OWN)
    for row in range(len(OWN)):
        for t, own in enumerate(OWN[row]):
            assert on_tokens[row, t] == (of[row, own - 1] if own else 0.0)
    np.testing.assert_array_equal(c.of_completion(on_tokens, OWN, COUNT), of)


def test_the_last_token_is_that_of_the_largest_position():
    positions = np.broadcast_to(np.arange(OWN.shape[1]), OWN.shape)
    wanted = by_hand(lambda mine: mine[-1])
    found = c.at_last(jnp.asarray(VALUES), OWN, positions, COUNT)
    np.testing.assert_allclose(found, wanted, rtol=1e-6)


def test_nothing_depends_on_the_order_of_the_tokens():
    """The tokens of a row that is spread over a mesh lie in another order."""
    order = np.random.default_rng(2).permutation(OWN.shape[1])
    positions = np.broadcast_to(np.arange(OWN.shape[1]), OWN.shape)
    for function in (
        lambda v, own, at: c.totals(v, own, COUNT),
        lambda v, own, at: c.at_last(v, own, at, COUNT),
        lambda v, own, at: c.pair_weights(own, COUNT),
    ):
        plain = function(jnp.asarray(VALUES), OWN, positions)
        moved = function(jnp.asarray(VALUES[:, order]), OWN[:, order], positions[:, order])
        np.testing.assert_allclose(plain, moved, rtol=1e-6)


def test_pairs_alternate_and_want_both_sides():
    sides = c.pairs(jnp.arange(8.0).reshape(2, 4))
    np.testing.assert_array_equal(sides.chosen, [[0, 2], [4, 6]])
    np.testing.assert_array_equal(sides.margin, -np.ones((2, 2)))
    np.testing.assert_array_equal(c.pair_weights(OWN, COUNT), [[1, 0], [1, 1], [0, 0], [1, 0]])
    weight = np.where(OWN > 2, 0.1, 0.5).astype(np.float32)
    found = c.pair_weights(OWN, COUNT, jnp.asarray(weight))
    np.testing.assert_array_equal(found, np.float32([[0.5, 0], [0.5, 0.1], [0, 0], [0.5, 0]]))
    np.testing.assert_array_equal(c.chosen_tokens(OWN), OWN % 2)
