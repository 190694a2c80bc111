"""Attention one head at a time: `attention.attend` for inference on a processor."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxtune.models.attention import Where, attend

# With fewer tokens than this, as in decoding, the loop costs more than it saves.
LEAST_TOKENS = 8


def attend_heads(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    where: Where,
    prefix: tuple[jax.Array, jax.Array] | None = None,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: jax.Array | None = None,
) -> jax.Array:
    """Returns what `attention.attend` returns, in a loop over rows and key heads.

    Scores [G, T, S] of one key head stay in a processor's cache, and its two products are plain
    matrix products; XLA's batched ones are several times slower there. On a mesh of several devices
    the loop would gather rows and heads.

    Args:
        query, key, value, where, prefix, scale, softcap, sinks: as in `attention.attend`.
    """
    (rows, tokens, heads, size), groups = query.shape, key.shape[2]
    if tokens < LEAST_TOKENS:
        settings = {"scale": scale, "softcap": softcap, "sinks": sinks}
        return attend(query, key, value, where, prefix, **settings)
    mask = where.mask
    if prefix is not None:
        lead = [jnp.broadcast_to(p.astype(key.dtype), (rows, *p.shape)) for p in prefix]
        key, value = (jnp.concatenate(p, axis=1) for p in zip(lead, (key, value), strict=True))
        mask = jnp.pad(mask, ((0, 0), (0, 0), (lead[0].shape[1], 0)), constant_values=True)
    each = heads // groups
    scale = size**-0.5 if scale is None else scale
    sink = None if sinks is None else sinks.astype(jnp.float32).reshape(groups, each, 1, 1)

    def head(number: jax.Array) -> jax.Array:
        row, group = number // groups, number % groups
        q = jax.lax.dynamic_index_in_dim(query, row, keepdims=False)
        q = jax.lax.dynamic_slice_in_dim(q, group * each, each, axis=1).swapaxes(0, 1)
        k, v = key[row, :, group], value[row, :, group]
        scores = jnp.matmul(q.reshape(each * tokens, size), k.T, preferred_element_type=jnp.float32)
        scores = scores.reshape(each, tokens, -1) * scale
        if softcap is not None:
            scores = softcap * jnp.tanh(scores / softcap)
        scores = jnp.where(mask[row], scores, jnp.finfo(jnp.float32).min)
        top = jnp.max(scores, axis=-1, keepdims=True)
        if sink is not None:
            top = jnp.maximum(top, sink[group])
        weights = jnp.exp(scores - top)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        if sink is not None:
            total = total + jnp.exp(sink[group] - top)
        mixed = jnp.matmul(
            weights.astype(v.dtype).reshape(each * tokens, -1),
            v,
            preferred_element_type=jnp.float32,
        )
        return (mixed.reshape(each, tokens, size) / total).astype(v.dtype).swapaxes(0, 1)

    found = jax.lax.map(head, jnp.arange(rows * groups))
    found = found.reshape(rows, groups, tokens, each, size).swapaxes(1, 2)
    return found.reshape(query.shape)
