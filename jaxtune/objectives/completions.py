"""From tokens to completions: sums and values of each completion in a row.

`completions` int32 [B, T] says which completion a token belongs to: 0 none (a prompt, padding),
c = 1 … C the c-th of its row. In paired data 2k − 1 and 2k are chosen and rejected of pair k.

Every reduction is a comparison, a selection and a sum that XLA fuses into one pass, with nothing of
shape [B, T, C] in memory. A segment sum would be a scatter, which is slow on TPUs, adds in no fixed
order on GPUs and does not divide over a mesh; a matrix product with one-hot rows would round to
bfloat16 on TPUs and carry a value that is not finite into its neighbours.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Pair(NamedTuple):
    """What belongs to the chosen and to the rejected side of each pair, both [B, P]."""

    chosen: jax.Array
    rejected: jax.Array

    @property
    def margin(self) -> jax.Array:
        """Returns chosen − rejected, [B, P]."""
        return self.chosen - self.rejected


def members(completions: jax.Array, count: int) -> jax.Array:
    """Returns bool [B, T, C]: whether the token belongs to the completion.

    Args:
        completions: int32 [B, T], 0 … C.
        count: C, static.
    """
    return completions[:, :, None] == jnp.arange(1, count + 1, dtype=completions.dtype)


def totals(values: jax.Array, completions: jax.Array, count: int) -> jax.Array:
    """Returns float32 [B, C], the sum of values [B, T] over the tokens of each completion.

    >>> import jax.numpy as jnp
    >>> totals(jnp.array([[9.0, 1.0, 2.0, 4.0]]), jnp.array([[0, 1, 1, 2]]), 2).tolist()
    [[3.0, 4.0]]
    """
    values = values.astype(jnp.float32)[:, :, None]
    return jnp.sum(jnp.where(members(completions, count), values, 0.0), axis=1)


def lengths(completions: jax.Array, count: int) -> jax.Array:
    """Returns float32 [B, C], the number of tokens of each completion."""
    return jnp.sum(members(completions, count), axis=1, dtype=jnp.float32)


def present(completions: jax.Array, count: int) -> jax.Array:
    """Returns bool [B, C]: whether the completion has a token."""
    return jnp.any(members(completions, count), axis=1)


def averages(values: jax.Array, completions: jax.Array, count: int) -> jax.Array:
    """Returns float32 [B, C], the mean of values [B, T] over each completion; 0 without tokens."""
    return totals(values, completions, count) / jnp.maximum(lengths(completions, count), 1.0)


def of_completion(values: jax.Array, completions: jax.Array, count: int) -> jax.Array:
    """Returns float32 [B, C], the value that stands on each token of a completion.

    Exact, as a mean of equal numbers is not; no gradient passes. 0 without tokens.

    Args:
        values: [B, T], the same number on all tokens of a completion.
        completions: int32 [B, T].
        count: C, static.
    """
    values = jax.lax.stop_gradient(values.astype(jnp.float32))[:, :, None]
    found = jnp.max(jnp.where(members(completions, count), values, -jnp.inf), axis=1)
    return jnp.where(present(completions, count), found, 0.0)


def at_last(
    values: jax.Array, completions: jax.Array, positions: jax.Array, count: int
) -> jax.Array:
    """Returns float32 [B, C], the value on the last token of each completion; 0 without tokens.

    Args:
        values: [B, T].
        completions: int32 [B, T].
        positions: int32 [B, T], rising along a completion. The last is told by them, since the
            tokens of a row that is spread over a mesh may lie in another order.
        count: C, static.
    """
    mine = members(completions, count)
    place = jnp.where(mine, positions[:, :, None], -1)
    last = mine & (place == jnp.max(place, axis=1, keepdims=True))
    return jnp.sum(jnp.where(last, values.astype(jnp.float32)[:, :, None], 0.0), axis=1)


def spread(values: jax.Array, completions: jax.Array) -> jax.Array:
    """Returns float32 [B, T]: each token has the value [B, C] of its completion, others 0.

    >>> import jax.numpy as jnp
    >>> spread(jnp.array([[3.0, 4.0]]), jnp.array([[0, 1, 1, 2]])).tolist()
    [[0.0, 3.0, 3.0, 4.0]]
    """
    mine = members(completions, values.shape[1])
    return jnp.sum(jnp.where(mine, values.astype(jnp.float32)[:, None, :], 0.0), axis=2)


def pairs(values: jax.Array) -> Pair:
    """Returns the sides [B, C / 2] of values [B, C]; completions alternate chosen, rejected."""
    return Pair(values[:, 0::2], values[:, 1::2])


def pair_weights(
    completions: jax.Array, count: int, example_weight: jax.Array | None = None
) -> jax.Array:
    """Returns float32 [B, C / 2], the weight of each pair; 0 where a side has no token.

    Args:
        completions: int32 [B, T].
        count: C, static and even.
        example_weight: float32 [B, T], the weight of its pair on each target token; None for 1.
    """
    both = pairs(present(completions, count))
    weights = (both.chosen & both.rejected).astype(jnp.float32)
    if example_weight is None:
        return weights
    return weights * pairs(of_completion(example_weight, completions, count)).chosen


def chosen_tokens(completions: jax.Array) -> jax.Array:
    """Returns float32 [B, T]: 1 on the tokens of chosen completions of paired data."""
    return (completions % 2).astype(jnp.float32)
