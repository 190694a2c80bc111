"""Causal attention within segments."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

# Of what a back end without scores gives, and keeps for its backward pass: small, costly to repeat.
ATTENDED = "attended"


class Span(NamedTuple):
    """Where the tokens of one side stand: segment_ids (0 = padding) and positions, int32 [B, T]."""

    segment_ids: jax.Array
    positions: jax.Array


@dataclasses.dataclass(frozen=True)
class Where:
    """Which keys a query sees, as every back end is told.

    Attributes:
        queries, keys: the tokens of both sides.
        window: as in `visible`; None with a mask, which knows it.
        mask: `visible` of them, bool [B, T, S], for the back ends that read it; it is the same for
            all layers of a kind and therefore made once. The others are given None.
    """

    queries: Span
    keys: Span
    window: int | None
    mask: jax.Array | None = None


def visible(
    queries: Span, keys: Span, window: int | None, branches: jax.Array | None = None
) -> jax.Array:
    """Returns bool [B, T, S]: same segment, not later, and within `window` positions.

    Positions grow by one inside a segment, so order by position is order in the row.

    Args:
        queries, keys: where the tokens of both sides stand.
        window: how many positions back a query sees, itself included; None is all.
        branches: int32 [B, T] of the tokens of both sides (T = S), where completions share a
            prompt: 0 on it, 1, 2, ... on them, and positions go on from the prompt's in each. A
            query sees the keys whose branch is 0 or its own.
    """
    same = queries.segment_ids[:, :, None] == keys.segment_ids[:, None, :]
    distance = queries.positions[:, :, None] - keys.positions[:, None, :]
    seen = same & (distance >= 0)
    if branches is not None:
        of_key = branches[:, None, :]
        seen = seen & ((of_key == 0) | (of_key == branches[:, :, None]))
    return seen if window is None else seen & (distance < window)


@jax.custom_jvp
def softmax(x: jax.Array) -> jax.Array:
    """Returns the softmax over the last axis.

    Its derivative is written in terms of the result, so that the backward pass holds one array of
    this size and not two, as it does for `jax.nn.softmax`.
    """
    return jax.nn.softmax(x, axis=-1)


@softmax.defjvp
def _softmax_jvp(primals, tangents):
    y, (dx,) = softmax(*primals), tangents
    return y, y * (dx - jnp.sum(y * dx, axis=-1, keepdims=True))


def attend(
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
    """Returns softmax(scale · q kᵀ) v, [B, T, N, H], with the softmax in float32.

    Args:
        query: [B, T, N, H].
        key, value: [B, S, K, H]; query head n reads key head n // (N / K).
        where: with its mask. A query without a visible key gives finite numbers, to be ignored.
        prefix: keys and values [P, K, H] that every query sees, or None.
        scale: None is 1 / √H.
        softcap: c; scores become c · tanh(scores / c).
        sinks: [N], a score a head that takes its share of the weight and gives nothing.
    """
    heads, groups, mask = query.shape[2], key.shape[2], where.mask
    if prefix is not None:
        batch, tokens = mask.shape[:2]
        lead = [jnp.broadcast_to(p.astype(key.dtype), (batch, *p.shape)) for p in prefix]
        key = jnp.concatenate([lead[0], key], axis=1)
        value = jnp.concatenate([lead[1], value], axis=1)
        always = jnp.ones((batch, tokens, lead[0].shape[1]), bool)
        mask = jnp.concatenate([always, mask], axis=2)
    grouped = query.reshape(*query.shape[:2], groups, heads // groups, query.shape[3])
    scores = jnp.einsum("btkgh,bskh->bkgts", grouped, key, preferred_element_type=jnp.float32)
    scores = scores * (query.shape[3] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    if sinks is None:
        weights = softmax(scores)
    else:
        sink = sinks.astype(jnp.float32).reshape(1, groups, heads // groups, 1, 1)
        sink = jnp.broadcast_to(sink, (*scores.shape[:-1], 1))
        weights = softmax(jnp.concatenate([scores, sink], axis=-1))[..., :-1]
    mixed = jnp.einsum("bkgts,bskh->btkgh", weights.astype(value.dtype), value)
    return mixed.reshape(query.shape)
