"""A sum with the weight it is to be divided by."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Weighted(NamedTuple):
    """A float32 sum and its float32 weight, both scalars; the mean is `sum / weight`.

    Losses and metrics stay in this form until the whole global batch is summed, because a mean of
    means weighs a short sequence's tokens more than a long one's (trl #2175, torchtune #2172).

    >>> float((Weighted(6.0, 2.0) + Weighted(2.0, 2.0)).mean())
    2.0
    """

    sum: jax.Array
    weight: jax.Array

    def __add__(self, other: Weighted) -> Weighted:  # type: ignore[override]
        return Weighted(self.sum + other.sum, self.weight + other.weight)

    def mean(self) -> jax.Array:
        """Returns sum / weight, and 0 where the weight is 0 (a batch without targets)."""
        safe = jnp.where(self.weight == 0, 1.0, self.weight)
        return jnp.where(self.weight == 0, 0.0, self.sum / safe)


def weighted(values: jax.Array, weights: jax.Array) -> Weighted:
    """Returns Weighted(Σ values·weights, Σ weights) in float32; shapes of the two are equal.

    A value under weight 0 is left out even when it is not finite.
    """
    weights = weights.astype(jnp.float32)
    kept = jnp.where(weights == 0, 0.0, values.astype(jnp.float32))
    return Weighted(jnp.sum(kept * weights), jnp.sum(weights))
