"""Functions of logits, a chunk of tokens at a time, so that [B, T, V] is never whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

# Logits of one device up to this size are built whole; larger ones in chunks of this size,
# which are computed again in the backward pass.
LOGITS_BYTES = 128 * 2**20


def in_chunks(
    function: Callable[[Any], Any],
    arrays: Any,
    vocab_size: int,
    *,
    heads: int = 1,
    logits_bytes: int = LOGITS_BYTES,
    shards: int = 1,
    pieces: int = 1,
) -> Any:
    """Returns function(arrays), computed a chunk of tokens at a time where its logits are large.

    Args:
        function: a tree of [B, t, …] → a tree of [B, t, …], each token's from its own alone. What
            it makes on the way is not kept but computed again in the backward pass.
        arrays: a tree of arrays [B, T, …].
        vocab_size: V.
        heads: how many arrays of float32 logits [B, t, V] the function makes.
        logits_bytes: the most bytes of logits that one device holds at a time.
        shards: over how many devices the rows are spread.
        pieces: over how many the tokens of each row are, which divides T; a chunk takes of each.
    """
    batch, whole = jax.tree.leaves(arrays)[0].shape[:2]
    tokens = whole // pieces
    per_column = heads * batch * vocab_size * 4 // shards
    chunk = max(1, logits_bytes // per_column)
    if chunk >= tokens:
        return function(arrays)
    count = -(-tokens // chunk)
    chunk = -(-tokens // count)
    padding = count * chunk - tokens

    def fold(x: jax.Array) -> jax.Array:
        rest = x.shape[2:]
        x = x.reshape(batch, pieces, tokens, *rest)
        x = jnp.pad(x, ((0, 0), (0, 0), (0, padding), *((0, 0),) * len(rest)))
        x = jnp.moveaxis(x.reshape(batch, pieces, count, chunk, *rest), 2, 0)
        return x.reshape(count, batch, pieces * chunk, *rest)

    def unfold(x: jax.Array) -> jax.Array:
        rest = x.shape[3:]
        x = jnp.moveaxis(x.reshape(count, batch, pieces, chunk, *rest), 0, 2)
        x = x.reshape(batch, pieces, count * chunk, *rest)[:, :, :tokens]
        return x.reshape(batch, whole, *rest)

    found = jax.lax.map(jax.checkpoint(function), jax.tree.map(fold, arrays))
    return jax.tree.map(unfold, found)
