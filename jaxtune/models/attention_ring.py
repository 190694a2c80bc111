"""Attention of rows whose tokens lie on several devices (ring attention).

Each device keeps its queries; keys and values go round the `sequence` axis, and what a query has
seen so far is kept as a running softmax (Liu et al. 2023, arXiv:2310.01889). Nothing of size
[T, S] is ever held: scores are made a block at a time, and again in the backward pass.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from jaxtune.models.attention import ATTENDED, Span, Where
from jaxtune.models.attention_blocks import (
    Keys,
    Queries,
    Rule,
    Running,
    Side,
    absorbed,
    block_size,
    grouped,
    in_blocks,
    joined,
    joined_scores,
    may_see,
    pulled,
    score_blocks,
    scores_of,
    seen_by,
    started,
)
from jaxtune.parallel.heads import share
from jaxtune.parallel.mesh import SEQUENCE_AXIS
from jaxtune.parallel.sequence import sequence_shards


def attend_ring(
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
    """Returns what `attention.attend` returns for real tokens, rows spread over `sequence`.

    The tokens of a row may stand in any order (`parallel.sequence.balanced`): segments and
    positions alone say what is visible.

    Args:
        query, key, value, prefix, scale, softcap, sinks: as in `attention.attend`, with as many
            keys as queries.
        where: queries and keys are the same tokens; the mask is not read.
    """
    batch, tokens, heads, size = query.shape
    spread = share(batch, tokens, heads, key.shape[2])
    if spread is not None and spread.repeat > 1:
        key, value = (jnp.repeat(x, spread.repeat, axis=2) for x in (key, value))
        if prefix is not None:
            prefix = tuple(jnp.repeat(x, spread.repeat, axis=1) for x in prefix)
    devices = 1 if spread is None or spread.tokens is None else sequence_shards()
    scale = size**-0.5 if scale is None else scale
    arrays = {"query": query, "key": key, "value": value}
    if prefix is not None:
        arrays["prefix"] = prefix
    if sinks is not None:
        arrays["sinks"] = sinks
    return _attend(Rule(where.window, scale, softcap, spread, devices), arrays, where.queries)


# -- on all devices: the derivative is written out, as a second trip round the ring --------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(rule: Rule, arrays: dict[str, Any], span: Span) -> jax.Array:
    return _forward(rule, arrays, span)[0]


def _forward(rule: Rule, arrays: dict[str, Any], span: Span):
    """Returns the result [B, T, N, H] and the logarithm of each query's Σ e^score, [B, N, T]."""
    results = _specs(rule, {"query": 0})["query"], _score_spec(rule)
    run = functools.partial(_local_forward, rule)
    found = _on_devices(rule, run, (arrays, span), results)
    mixed, log_total = (checkpoint_name(array, ATTENDED) for array in found)
    return mixed, (arrays, span, mixed, log_total)


def _backward(rule: Rule, kept, cotangent: jax.Array):
    arrays, span, mixed, log_total = kept
    run = functools.partial(_local_backward, rule)
    given = (arrays, span, mixed, log_total, cotangent)
    return _on_devices(rule, run, given, _specs(rule, arrays)), None


_attend.defvjp(_forward, _backward)


def _specs(rule: Rule, arrays: dict[str, Any]) -> dict[str, Any]:
    """Returns the PartitionSpec of each array."""
    if rule.spread is None:
        return dict.fromkeys(arrays)
    states, heads = rule.spread.states, rule.spread.heads
    lead = PartitionSpec(None, heads, None)
    known = {"prefix": (lead, lead), "sinks": PartitionSpec(heads)}
    return {name: known.get(name, states) for name in arrays}


def _score_spec(rule: Rule) -> PartitionSpec | None:
    s = rule.spread
    return None if s is None else PartitionSpec(s.rows, s.heads, s.tokens)


def _on_devices(rule: Rule, run: Callable, given: tuple, results: Any) -> Any:
    """Runs a function on each device's share of (arrays, span, result, log total, cotangent)."""
    if rule.spread is None:
        return run(*given)
    states, span = rule.spread.states, rule.spread.span
    specs = (_specs(rule, given[0]), Span(span, span), states, _score_spec(rule), states)
    mapped = jax.shard_map(
        run, in_specs=specs[: len(given)], out_specs=results, check_vma=False
    )  # sums over devices are written out below
    return mapped(*given)


# -- on one device -------------------------------------------------------------------------------


def _local_forward(rule: Rule, arrays: dict[str, Any], span: Span):
    (query, span), key, value = _tied(arrays["query"], span), arrays["key"], arrays["value"]
    size = block_size(*query.shape[:3])
    queries = Queries(in_blocks(grouped(query, key.shape[2]), size), in_blocks(span, size))
    running = jax.lax.map(lambda q: started(rule, arrays, q), queries.states)

    def pair(state: Running, q: Queries, k: Keys) -> Running:
        scores, _ = scores_of(rule, q.states, k.key)
        return absorbed(state, scores, seen_by(rule, q.span, k.span), k.value)

    def one_shard(state: Running, keys: Keys) -> Running:
        blocks = in_blocks(keys, size)

        def one_query_block(_, given):
            def one_pair(state, k):
                may = may_see(rule, given[0].span, k.span)
                return jax.lax.cond(may, pair, lambda s, *_: s, state, given[0], k), None

            return None, jax.lax.scan(one_pair, given[1], blocks)[0]

        return jax.lax.scan(one_query_block, None, (queries, state))[1]

    def step(carry, _):
        keys, state = carry
        return (_passed_on(rule, keys), one_shard(state, keys)), None

    keys = Keys(key, value, span)
    (_, running), _ = jax.lax.scan(step, (keys, running), length=rule.devices)
    total = jnp.where(running.total > 0, running.total, 1.0)  # padding sees nothing
    mixed = jnp.moveaxis(running.mixed / total[..., None], -2, 2)  # [.., B, t, K, G, H]
    log_total = joined_scores(running.top + jnp.log(total))
    return joined(mixed).reshape(query.shape).astype(query.dtype), log_total


def _local_backward(rule: Rule, arrays, span, result, log_total, cotangent):
    (query, span), key, value = _tied(arrays["query"], span), arrays["key"], arrays["value"]
    size, groups = block_size(*query.shape[:3]), key.shape[2]
    inner = jnp.einsum(
        "btnh,btnh->bnt", result, cotangent, preferred_element_type=jnp.float32
    )  # Σ weight · d weight
    side = Side(
        in_blocks(grouped(cotangent, groups), size),
        score_blocks(log_total, groups, size),
        score_blocks(inner, groups, size),
    )
    queries = Queries(in_blocks(grouped(query, groups), size), in_blocks(span, size))

    def pair(sums, q: Queries, s: Side, k: Keys):
        dq, dk, dv = pulled(rule, q.states, s, k.key, k.value, seen_by(rule, q.span, k.span))
        return sums[0] + dq, sums[1] + dk, sums[2] + dv

    def one_shard(d_query, keys: Keys, d_key, d_value):
        blocks, d_blocks = in_blocks(keys, size), (in_blocks(d_key, size), in_blocks(d_value, size))

        def one_query_block(d_blocks, given):
            q, s, dq = given

            def one_pair(dq, given):
                k, dk, dv = given
                may = may_see(rule, q.span, k.span)
                sums = (dq, dk, dv)
                dq, dk, dv = jax.lax.cond(may, pair, lambda sums, *_: sums, sums, q, s, k)
                return dq, (dk, dv)

            dq, d_blocks = jax.lax.scan(one_pair, dq, (blocks, *d_blocks))
            return d_blocks, dq

        d_blocks, d_query = jax.lax.scan(one_query_block, d_blocks, (queries, side, d_query))
        return d_query, *(joined(d) for d in d_blocks)

    def step(carry, _):
        keys, d_query, d_key, d_value = carry
        d_query, d_key, d_value = one_shard(d_query, keys, d_key, d_value)
        # The sums travel with their keys, and after the last step they are at home.
        keys, d_key, d_value = _passed_on(rule, (keys, d_key, d_value))
        return (keys, d_query, d_key, d_value), None

    zero_query = jnp.zeros(queries.states.shape, jnp.float32)
    zero_keys = jnp.zeros(key.shape, jnp.float32)
    carry = (Keys(key, value, span), zero_query, zero_keys, zero_keys)
    (_, d_query, d_key, d_value), _ = jax.lax.scan(step, carry, length=rule.devices)
    grads = {"key": d_key, "value": d_value}
    if "prefix" in arrays:
        more, grads["prefix"] = _prefix_gradients(rule, arrays, queries.states, side)
        d_query = d_query + more
    grads["query"] = joined(d_query).reshape(query.shape)
    if "sinks" in arrays:
        sinks = arrays["sinks"].astype(jnp.float32)
        weight = jnp.exp(sinks[None, :, None] - log_total)
        grads["sinks"] = _summed(rule, -jnp.sum(weight * inner, axis=(0, 2)))
    return jax.tree.map(lambda g, a: g.astype(a.dtype), grads, arrays)


def _prefix_gradients(rule: Rule, arrays, queries: jax.Array, side: Side):
    keys, values = (jnp.broadcast_to(p, (queries.shape[1], *p.shape)) for p in arrays["prefix"])

    def one_query_block(sums, given):
        dq, dk, dv = pulled(rule, *given, keys, values, jnp.ones((), bool))
        return (sums[0] + jnp.sum(dk, axis=0), sums[1] + jnp.sum(dv, axis=0)), dq

    zeros = jnp.zeros(keys.shape[1:], jnp.float32)
    sums, d_query = jax.lax.scan(one_query_block, (zeros, zeros), (queries, side))
    return d_query, jax.tree.map(functools.partial(_summed, rule), sums)


def _tied(query: jax.Array, span: Span) -> tuple[jax.Array, Span]:
    """Returns both as they are, the span as something that came with the query.

    Layers share their span, and what is made of it alone would be made once for all of them and
    kept: masks of every block, an array [T, S].
    """
    return jax.lax.optimization_barrier((query, span))


def _passed_on(rule: Rule, tree: Any) -> Any:
    """Returns what the device before this one in the ring had."""
    if rule.devices == 1:
        return tree
    ring = [(i, (i + 1) % rule.devices) for i in range(rule.devices)]
    return jax.tree.map(lambda x: jax.lax.ppermute(x, SEQUENCE_AXIS, ring), tree)


def _summed(rule: Rule, x: jax.Array) -> jax.Array:
    """Returns the sum over the devices that rows and tokens are spread over."""
    if rule.spread is None or not rule.spread.axes:
        return x
    return jax.lax.psum(x, rule.spread.axes)
