"""From the logits of one position to a token id."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Drawn(NamedTuple):
    """One token of each row.

    Attributes:
        ids: int32 [B].
        logprobs: float32 [B], ln p of each id with the temperature applied, before top-k and top-p
            narrow the choice; with temperature 0, that of temperature 1.
    """

    ids: jax.Array
    logprobs: jax.Array


def sample(
    logits: jax.Array,
    keys: jax.Array,
    temperature: jax.Array | float,
    top_k: jax.Array | int,
    top_p: jax.Array | float,
) -> Drawn:
    """Returns one token for each row.

    Temperature, then top-k, then top-p over what top-k left, as transformers orders them. The three
    settings are runtime scalars: changing them compiles nothing. A draw inverts the cumulative
    distribution, so that it costs two random numbers a row and not one a token of the vocabulary.

    Args:
        logits: float32 [B, V].
        keys: random keys [B]; a row's draw depends on its own key and logits only.
        temperature: divides the logits; 0 takes the largest logit.
        top_k: keeps the k largest logits, and what ties with the k-th; 0 keeps all.
        top_p: keeps the likeliest tokens up to and including the one whose cumulative probability
            reaches p (nucleus sampling, Holtzman et al. 2019, arXiv:1904.09751); 1 keeps all.
    """
    temperature = jnp.asarray(temperature, jnp.float32)
    heat = jnp.where(temperature > 0, temperature, 1.0)
    # Without its maximum first, a tiny temperature would overflow the row.
    scores = (logits - jnp.max(logits, axis=-1, keepdims=True)) / heat
    narrowed = (jnp.asarray(top_k) > 0) | (jnp.asarray(top_p) < 1.0)
    uniform = jax.vmap(lambda key: jax.random.uniform(key, (2,)))(keys)

    def greedy():
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def everything():
        return invert(jnp.exp(scores), uniform)

    def filtered():
        return invert(jnp.where(kept(scores, top_k, top_p), jnp.exp(scores), 0.0), uniform)

    way = jnp.where(temperature > 0, jnp.where(narrowed, 2, 1), 0)
    ids = jax.lax.switch(way, (greedy, everything, filtered))
    chosen = jnp.take_along_axis(scores, ids[:, None], axis=-1)[:, 0]
    return Drawn(ids, chosen - jnp.log(jnp.sum(jnp.exp(scores), axis=-1)))


def invert(weights: jax.Array, uniform: jax.Array) -> jax.Array:
    """Returns for each row an index drawn in proportion to its weights, int32 [B].

    First one of √V groups of indices is drawn, then an index in it: two short sums in place of a
    long one, whose float32 steps would swallow small weights.

    Args:
        weights: float32 [B, V], not negative, some above 0.
        uniform: float32 [B, 2] in [0, 1).
    """
    rows, count = weights.shape
    size = 1 << (max(count - 1, 1).bit_length() + 1) // 2
    groups = -(-count // size)
    # Index v is in group v mod `groups`: so the sums run over the outer axis, which vectorises.
    grid = jnp.pad(weights, ((0, 0), (0, size * groups - count))).reshape(rows, size, groups)
    group = first_beyond(jnp.sum(grid, axis=1), uniform[:, 0])
    place = first_beyond(
        jnp.take_along_axis(grid, group[:, None, None], axis=2)[:, :, 0], uniform[:, 1]
    )
    return place * groups + group


def first_beyond(weights: jax.Array, uniform: jax.Array) -> jax.Array:
    """Returns the first index at which the sum of weights so far exceeds its share, int32 [B].

    Args:
        weights: float32 [B, V].
        uniform: float32 [B], the share of the whole sum.
    """
    # A sum may fall by a rounding error where a weight is 0; such a place is never taken.
    sums = jnp.where(weights > 0, jnp.cumsum(weights, axis=-1), 0.0)
    share = uniform[:, None] * jnp.max(sums, axis=-1, keepdims=True)
    return jnp.argmax(sums > share, axis=-1).astype(jnp.int32)


def kept(scores: jax.Array, top_k: jax.Array | int, top_p: jax.Array | float) -> jax.Array:
    """Returns which tokens top-k and top-p leave, bool [B, V].

    Args:
        scores: float32 [B, V].
        top_k, top_p: as in `sample`.
    """
    order = jnp.argsort(scores, axis=-1, descending=True)
    ranked = nucleus(jnp.take_along_axis(scores, order, axis=-1), top_k, top_p)
    return jnp.put_along_axis(
        jnp.zeros(scores.shape, bool), order, ranked > -jnp.inf, axis=-1, inplace=False
    )


def nucleus(ranked: jax.Array, top_k: jax.Array | int, top_p: jax.Array | float) -> jax.Array:
    """Returns `ranked` with what top-k and top-p leave out at -inf.

    Args:
        ranked: float32 [B, V] scores, each row in descending order.
        top_k, top_p: as in `sample`.
    """
    count = ranked.shape[-1]
    top_k, top_p = jnp.asarray(top_k, jnp.int32), jnp.asarray(top_p, jnp.float32)
    smallest = jnp.take(ranked, jnp.clip(top_k - 1, 0, count - 1), axis=-1)[:, None]
    ranked = jnp.where((top_k <= 0) | (ranked >= smallest), ranked, -jnp.inf)
    probabilities = jax.nn.softmax(ranked, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    kept = (top_p >= 1.0) | (before < top_p) | (jnp.arange(count) == 0)
    return jnp.where(kept, ranked, -jnp.inf)


def row_keys(seed: int, first_row: int, count: int) -> jax.Array:
    """Returns the keys of rows first_row … first_row + count - 1, a key array [count]."""
    rows = jnp.arange(first_row, first_row + count)
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(jax.random.key(seed), rows)


def step_keys(keys: jax.Array, step: jax.Array | int) -> jax.Array:
    """Returns the rows' keys [B] for one new token; `step` is one number, or one a row [B]."""
    return jax.vmap(jax.random.fold_in)(keys, jnp.broadcast_to(step, keys.shape))
