"""Attention on TPU by the Pallas kernel that comes with JAX, "splash" attention."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxtune.models.attention import ATTENDED, Where
from jaxtune.parallel.heads import share

# The kernel's lanes: rows are as long as a multiple of this.
LANES = 128
BLOCKS = (512, 256, LANES)


def attend_splash(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    where: Where,
    prefix: None = None,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: jax.Array | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Returns what `attention.attend` returns, for real tokens, without an array [T, S].

    Blocks that the causal order or the window rules out are not visited. Order in the row is order
    by position inside a segment, so the kernel needs the segments only. Rows and heads are spread
    over the mesh, and each device runs the kernel on its own.

    Args:
        query, key, value, scale, softcap, sinks: as in `attention.attend`, with as many keys as
            queries, a multiple of `LANES`.
        where: queries and keys are the same tokens; the mask is not read.
        prefix: None; the kernel has no place for keys that every segment sees.
        interpret: run the kernel's program step by step on any platform: for tests.
    """
    if prefix is not None:
        raise ValueError("the splash kernel does not take a prefix")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scaled = (query.astype(jnp.float32) * scale).astype(query.dtype)

    def local(q, k, v, segments, *extra):
        kernel = _kernel(q.shape[2], q.shape[1], where.window, softcap, interpret)

        def row(q, k, v, segments):
            heads_first = [x.swapaxes(0, 1) for x in (q, k, v)]
            return kernel(*heads_first, _segments(segments), *extra).swapaxes(0, 1)

        return jax.vmap(row)(q, k, v, segments)

    spread = share(*query.shape[:3], key.shape[2])
    extra = () if sinks is None else (sinks.astype(jnp.float32),)
    if spread is None:
        return local(scaled, key, value, where.queries.segment_ids, *extra)
    if spread.repeat > 1:
        key, value = (jnp.repeat(x, spread.repeat, axis=2) for x in (key, value))
    states = PartitionSpec(spread.rows, None, spread.heads, None)
    lone = [PartitionSpec(spread.heads)] * len(extra)
    run = jax.shard_map(
        local,
        in_specs=(states, states, states, PartitionSpec(spread.rows, None), *lone),
        out_specs=states,
        check_vma=False,  # the kernel does not say over which axes its results vary
    )
    return run(scaled, key, value, where.queries.segment_ids, *extra)


def _segments(segment_ids: jax.Array):
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    return splash.SegmentIds(segment_ids, segment_ids)


def _kernel(heads: int, tokens: int, window: int | None, softcap: float | None, interpret: bool):
    """Returns the kernel for rows of `tokens`, which knows the blocks to visit.

    Made anew in every trace: its tables are constants of the program, of no device as yet.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    shape = (tokens, tokens)
    if window is None or window >= tokens:
        mask = splash.CausalMask(shape)
    else:
        mask = splash.LocalMask(shape, (window - 1, 0), 0)
    block = next(size for size in BLOCKS if tokens % size == 0)
    names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    return splash.make_splash_mha(
        splash.MultiHeadMask([mask] * heads),
        block_sizes=splash.BlockSizes(**{f"block_{name}": block for name in names}),
        attn_logits_soft_cap=softcap,
        residual_checkpoint_name=ATTENDED,
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )
