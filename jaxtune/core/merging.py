"""Task vectors, what tuning changed in a weight, put together after training."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

# [M, ...] task vectors of M models, density, random key → one task vector [...], all float32
Combine = Callable[[jax.Array, float, jax.Array], jax.Array]


def soup(vectors: jax.Array, density: float, key: jax.Array) -> jax.Array:
    """Returns the mean [...] of task vectors [M, ...] (Wortsman et al. 2022, arXiv:2203.05482)."""
    del density, key
    return jnp.mean(vectors, axis=0)


def ties(vectors: jax.Array, density: float, key: jax.Array) -> jax.Array:
    """Returns the TIES merge [...] of task vectors [M, ...].

    Of each vector the share `density` of largest magnitude stays; each element takes the sign that
    has the larger total; the mean is over the vectors that agree with it. The share is taken within
    each weight, not over the whole model.

    Source: Yadav et al. 2023, arXiv:2306.01708.
    """
    del key
    flat = vectors.reshape(vectors.shape[0], -1)
    kept = jnp.maximum(1, jnp.round(density * flat.shape[1]).astype(jnp.int32))
    least = jnp.take(jnp.sort(jnp.abs(flat), axis=1), flat.shape[1] - kept, axis=1)
    trimmed = jnp.where(jnp.abs(flat) >= least[:, None], flat, 0.0)
    sign = jnp.sign(jnp.sum(trimmed, axis=0))
    agrees = (jnp.sign(trimmed) == sign) & (trimmed != 0)
    mean = jnp.sum(jnp.where(agrees, trimmed, 0.0), axis=0) / jnp.maximum(agrees.sum(axis=0), 1)
    return mean.reshape(vectors.shape[1:])


def dare(vectors: jax.Array, density: float, key: jax.Array) -> jax.Array:
    """Returns the mean [...] of task vectors [M, ...] of which a random part was dropped.

    An element stays with probability `density` and is then divided by it, so that the expected
    vector does not change.

    Source: Yu et al. 2024, arXiv:2311.03099.
    """
    kept = jax.random.bernoulli(key, density, vectors.shape)
    return jnp.mean(jnp.where(kept, vectors / density, 0.0), axis=0)


# By the name that `export --merge` takes.
COMBINE: dict[str, Combine] = {"soup": soup, "ties": ties, "dare": dare}


def combined(
    base: jax.Array,
    tuned: Sequence[jax.Array],
    combine: Combine,
    *,
    share: float,
    density: float,
    key: jax.Array,
) -> jax.Array:
    """Returns base + share · combine(tuned − base), in float32.

    Args:
        base, tuned: [...], a weight before tuning, and behind it in each model.
        combine: of `COMBINE`.
        share: 0 gives the base, 1 what was tuned; between them WiSE-FT (Wortsman et al. 2022,
            arXiv:2109.01903).
        density: part of each task vector that TIES and DARE keep.
        key: of what DARE drops.
    """
    base = base.astype(jnp.float32)
    vectors = jnp.stack([weight.astype(jnp.float32) - base for weight in tuned])
    return base + share * combine(vectors, density, key)
