"""Attention on NVIDIA by cuDNN's flash attention, as `jax.nn.dot_product_attention` calls it."""

from __future__ import annotations

import jax
from jax.sharding import PartitionSpec

from jaxtune.models.attention import Where
from jaxtune.parallel.heads import share


def attend_cudnn(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    where: Where,
    prefix: None = None,
    *,
    scale: float | None = None,
    softcap: None = None,
    sinks: None = None,
) -> jax.Array:
    """Returns what `attention.attend` returns, for real tokens of rows of one segment each.

    cuDNN knows no segments, only order in the row. With one segment a row and padding behind it,
    that is enough: a real token sees no later one, and what padding sees is not used.

    Args:
        query, key, value, scale: as in `attention.attend`, bfloat16, as many keys as queries.
        where: queries and keys are the same tokens; only the window is read.
        prefix, softcap, sinks: None; cuDNN has no place for them.
    """
    if prefix is not None or softcap is not None or sinks is not None:
        raise ValueError("cuDNN attention takes no prefix, soft cap or sinks")

    def local(q, k, v):
        return jax.nn.dot_product_attention(
            q,
            k,
            v,
            scale=scale,
            is_causal=True,
            local_window_size=None if where.window is None else (where.window - 1, 0),
            implementation="cudnn",
        )

    spread = share(*query.shape[:3], key.shape[2])
    if spread is None:
        return local(query, key, value)
    if spread.repeat > 1:
        key, value = (jax.numpy.repeat(x, spread.repeat, axis=2) for x in (key, value))
    states = PartitionSpec(spread.rows, None, spread.heads, None)
    run = jax.shard_map(local, in_specs=(states,) * 3, out_specs=states, check_vma=False)
    return run(query, key, value)
