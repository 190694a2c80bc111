"""The keys and values that a decoder keeps of the tokens so far."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jaxtune.models.attention import Span
from jaxtune.models.config import ModelConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys and values of the tokens so far.

    Attributes:
        keys, values: [L, B, K, S, H]: a token is written to a column and a head's are read
            together. Keys are rotated, unless the angles follow the length of the segment.
        segment_ids, positions: int32 [B, S]; segment 0 is padding or empty.
        length: int32 scalar, the next column to write.
    """

    keys: jax.Array
    values: jax.Array
    segment_ids: jax.Array
    positions: jax.Array
    length: jax.Array


def empty_cache(config: ModelConfig, batch: int, slots: int) -> Cache:
    """Returns a cache with `slots` empty columns for each of `batch` rows."""
    shape = (config.num_layers, batch, config.num_kv_heads, slots, config.head_dim)
    zeros = jnp.zeros((batch, slots), jnp.int32)
    return Cache(
        jnp.zeros(shape, config.compute_dtype),
        jnp.zeros(shape, config.compute_dtype),
        zeros,
        zeros,
        jnp.zeros((), jnp.int32),
    )


def write_span(cache: Cache, queries: Span) -> Span:
    """Returns the cache's segment ids and positions with the new tokens written in."""
    start = (0, cache.length)
    return Span(
        jax.lax.dynamic_update_slice(cache.segment_ids, queries.segment_ids, start),
        jax.lax.dynamic_update_slice(cache.positions, queries.positions, start),
    )


def write_column(stored: jax.Array, layer: jax.Array, column: jax.Array, new: jax.Array):
    """Returns what is stored [L, B, K, S, H] with new [B, T, K, H] in a layer from a column on."""
    new = new.swapaxes(1, 2).astype(stored.dtype)[None]
    return jax.lax.dynamic_update_slice(stored, new, (layer, 0, 0, column, 0))
