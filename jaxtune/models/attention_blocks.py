"""Attention by blocks: scores of some queries and some keys, and the running softmax over them."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxtune.models.attention import Span, visible
from jaxtune.parallel.heads import Share

# The most bytes of one block of scores on one device.
BLOCK_BYTES = 64 * 2**20
LOWEST = float(jnp.finfo(jnp.float32).min) / 2  # finite: differences of two are numbers


@dataclasses.dataclass(frozen=True)
class Rule:
    """What is known of an attention while the program is made.

    Attributes:
        window, scale, softcap: as in `attention.attend`.
        spread: the layout on the mesh, None on one device.
        devices: how many the ring has.
    """

    window: int | None
    scale: float
    softcap: float | None
    spread: Share | None
    devices: int


class Running(NamedTuple):
    """A softmax in progress: the largest score, Σ e^(score - top), Σ e^(score - top) value.

    float32 [..., B, K, G, t] twice, and [..., B, K, G, t, H]; G query heads read one key head.
    """

    top: jax.Array
    total: jax.Array
    mixed: jax.Array


class Queries(NamedTuple):
    """Blocks of queries [.., B, t, K, G, H] and where they stand."""

    states: jax.Array
    span: Span


class Keys(NamedTuple):
    """Keys and values [.., B, s, K, H] and where they stand."""

    key: jax.Array
    value: jax.Array
    span: Span


class Side(NamedTuple):
    """What the backward pass knows of a block of queries: cotangent [.., B, t, K, G, H], the
    logarithm of Σ e^score and Σ weight · d weight, both [.., B, K, G, t].
    """

    cotangent: jax.Array
    log_total: jax.Array
    inner: jax.Array


def scores_of(rule: Rule, query: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns scores float32 [B, K, G, t, s], and their derivative by the scaled product."""
    scores = jnp.einsum("btkgh,bskh->bkgts", query, key, preferred_element_type=jnp.float32)
    scores = scores * rule.scale
    if rule.softcap is None:
        return scores, jnp.ones((), jnp.float32)
    bent = jnp.tanh(scores / rule.softcap)
    return rule.softcap * bent, 1 - bent * bent


def seen_by(rule: Rule, queries: Span, keys: Span) -> jax.Array:
    """Returns which keys are visible, bool [B, 1, 1, t, s]; padding neither sees nor is seen."""
    seen = visible(queries, keys, rule.window) & (keys.segment_ids > 0)[:, None, :]
    return seen[:, None, None]


def started(rule: Rule, arrays: dict[str, Any], query: jax.Array) -> Running:
    """Returns the softmax before any token is seen: sinks and prefix."""
    batch, tokens, groups, each, size = query.shape
    shape = (batch, groups, each, tokens)
    if "sinks" in arrays:
        sinks = arrays["sinks"].astype(jnp.float32).reshape(1, groups, each, 1)
        top, total = jnp.broadcast_to(sinks, shape), jnp.ones(shape, jnp.float32)
    else:
        top, total = jnp.full(shape, LOWEST), jnp.zeros(shape, jnp.float32)
    running = Running(top, total, jnp.zeros((*shape, size), jnp.float32))
    if "prefix" not in arrays:
        return running
    keys, values = (jnp.broadcast_to(p, (batch, *p.shape)) for p in arrays["prefix"])
    scores, _ = scores_of(rule, query, keys.astype(query.dtype))
    return absorbed(running, scores, jnp.ones((), bool), values.astype(query.dtype))


def absorbed(state: Running, scores: jax.Array, seen: jax.Array, value: jax.Array) -> Running:
    """Returns the softmax after more keys; scores [B, K, G, t, s], value [B, s, K, H]."""
    scores = jnp.where(seen, scores, LOWEST)
    top = jnp.maximum(state.top, jnp.max(scores, axis=-1))
    weights = jnp.where(seen, jnp.exp(scores - top[..., None]), 0.0)
    faded = jnp.exp(state.top - top)
    more = jnp.einsum(
        "bkgts,bskh->bkgth",
        weights.astype(value.dtype),
        value,
        preferred_element_type=jnp.float32,
    )
    return Running(
        top, state.total * faded + jnp.sum(weights, axis=-1), state.mixed * faded[..., None] + more
    )


def pulled(
    rule: Rule,
    query: jax.Array,
    side: Side,
    key: jax.Array,
    value: jax.Array,
    seen: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the gradients by one block's queries [B, t, K, G, H], keys and values [B, s, K, H].

    Args:
        query, key, value: the blocks.
        side: of the queries.
        seen: bool, which pairs are visible, broadcast to the scores.
    """
    key, value = key.astype(query.dtype), value.astype(query.dtype)
    scores, bend = scores_of(rule, query, key)
    weights = jnp.where(seen, jnp.exp(scores - side.log_total[..., None]), 0.0)
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    d_weights = product("btkgh,bskh->bkgts", side.cotangent, value)
    d_scores = weights * (d_weights - side.inner[..., None]) * bend * rule.scale
    weights, d_scores = weights.astype(query.dtype), d_scores.astype(query.dtype)
    return (
        product("bkgts,bskh->btkgh", d_scores, key),
        product("bkgts,btkgh->bskh", d_scores, query),
        product("bkgts,btkgh->bskh", weights, side.cotangent),
    )


def may_see(rule: Rule, queries: Span, keys: Span) -> jax.Array:
    """Returns False where no query of a block can see any of the keys, from their extremes alone.

    Tokens are compared by (segment, position), which is their order in the row.
    """
    (first_query, last_query), (first_key, last_key) = _extremes(queries), _extremes(keys)
    seen = _not_later(first_key, last_query) & (first_query.segment_ids <= last_key.segment_ids)
    if rule.window is not None:
        near = first_query.positions - last_key.positions < rule.window
        seen &= near | (first_query.segment_ids != last_key.segment_ids)
    return jnp.any(seen)


def _not_later(a: Span, b: Span) -> jax.Array:
    same = a.segment_ids == b.segment_ids
    return jnp.where(same, a.positions <= b.positions, a.segment_ids < b.segment_ids)


def _extremes(span: Span) -> tuple[Span, Span]:
    """Returns the first and the last real token of each row [B]; without any, last < first."""
    segments, positions = span
    far = jnp.iinfo(jnp.int32).max
    first = jnp.min(jnp.where(segments > 0, segments, far), axis=1)
    last = jnp.max(segments, axis=1)
    begin = jnp.min(jnp.where(segments == first[:, None], positions, far), axis=1)
    end = jnp.max(jnp.where(segments == last[:, None], positions, -1), axis=1)
    return Span(first, begin), Span(last, end)


def block_size(batch: int, tokens: int, heads: int) -> int:
    """Returns the number of tokens in a block: half of a device's, or a smaller divisor."""
    fitting = (BLOCK_BYTES / (4 * batch * heads)) ** 0.5
    largest = max(1, min(tokens // 2, int(fitting)))
    return next(size for size in range(largest, 0, -1) if tokens % size == 0)


def grouped(x: jax.Array, groups: int) -> jax.Array:
    """[B, T, N, H] → [B, T, K, G, H]."""
    return x.reshape(*x.shape[:2], groups, -1, x.shape[3])


def in_blocks(tree: Any, size: int) -> Any:
    """[B, T, ...] → [T / size, B, size, ...] of each array."""

    def cut(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x.reshape(x.shape[0], -1, size, *x.shape[2:]), 1, 0)

    return jax.tree.map(cut, tree)


def joined(x: jax.Array) -> jax.Array:
    """The inverse of `in_blocks`."""
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])


def score_blocks(x: jax.Array, groups: int, size: int) -> jax.Array:
    """[B, N, T] → [T / size, B, K, G, size]."""
    x = x.reshape(x.shape[0], groups, -1, x.shape[2] // size, size)
    return jnp.moveaxis(x, 3, 0)


def joined_scores(x: jax.Array) -> jax.Array:
    """The inverse of `score_blocks`."""
    x = jnp.moveaxis(x, 0, 3)
    return x.reshape(x.shape[0], x.shape[1] * x.shape[2], -1)
