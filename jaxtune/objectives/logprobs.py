"""Log-probabilities of given tokens, without the [B, T, V] array."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

# Logits of one device up to this size are built whole; larger ones in chunks of this size,
# which are computed again in the backward pass.
LOGITS_BYTES = 128 * 2**20


class Scores(NamedTuple):
    """Of each target token: its log-probability, and whether it is the most likely one."""

    logprobs: jax.Array
    correct: jax.Array


def shift(batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Returns (targets, weights) [B, T] of the prediction made at each position.

    Position t predicts token t + 1; the last position predicts nothing. `loss_mask` weighs a
    token as a target, so it moves with it.

    >>> import jax.numpy as jnp
    >>> batch = {"input_ids": jnp.array([[5, 6, 7]]), "loss_mask": jnp.array([[0.0, 1.0, 1.0]])}
    >>> [a.tolist() for a in shift(batch)]
    [[[6, 7, 0]], [[1.0, 1.0, 0.0]]]
    """
    targets = jnp.pad(batch["input_ids"][:, 1:], ((0, 0), (0, 1)))
    weights = jnp.pad(batch["loss_mask"][:, 1:], ((0, 0), (0, 1)))
    return targets, weights


class PolicyScores(NamedTuple):
    """Of each target token: its log-probability, and the entropy of the choice, in nats."""

    logprobs: jax.Array
    entropy: jax.Array


def policy_scores(logits: jax.Array, targets: jax.Array) -> PolicyScores:
    """Returns the PolicyScores of targets [...] under float32 logits [..., V]."""
    logprobs = jax.nn.log_softmax(logits, axis=-1)
    chosen = jnp.take_along_axis(logprobs, targets[..., None], axis=-1)[..., 0]
    p = jnp.exp(logprobs)
    # A token that the policy rules out adds nothing, even where its log-probability is −inf.
    return PolicyScores(chosen, -jnp.sum(jnp.where(p > 0, p * logprobs, 0.0), axis=-1))


def plain_scores(logits: jax.Array, targets: jax.Array) -> Scores:
    """Returns the Scores of targets [...] under float32 logits [..., V]: the oracle."""
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    logprobs = chosen - jax.nn.logsumexp(logits, axis=-1)
    return Scores(logprobs, chosen >= jnp.max(logits, axis=-1))


def token_scores(
    head: Callable[[jax.Array], jax.Array],
    hidden: jax.Array,
    targets: jax.Array,
    vocab_size: int,
    *,
    logits_bytes: int = LOGITS_BYTES,
    shards: int = 1,
    pieces: int = 1,
    score: Callable[[jax.Array, jax.Array], NamedTuple] = plain_scores,
) -> Any:
    """Returns the Scores [B, T] of targets under head(hidden), or what `score` makes of them.

    Args:
        head: hidden [B, t, D] → float32 logits [B, t, V].
        hidden: [B, T, D].
        targets: int32 [B, T].
        vocab_size: V.
        logits_bytes: the most bytes of logits that one device holds at a time.
        shards: over how many devices the rows are spread.
        pieces: over how many the tokens of each row are, which divides T; a chunk takes of each.
        score: (float32 logits [..., V], targets [...]) → a tuple of arrays [...].
    """
    batch, tokens = hidden.shape[0], hidden.shape[1] // pieces
    per_column = batch * vocab_size * 4 // shards
    chunk = max(1, logits_bytes // per_column)
    if chunk >= tokens:
        return score(head(hidden), targets)
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
        x = jnp.moveaxis(x.reshape(count, batch, pieces, chunk), 0, 2)
        return x.reshape(batch, pieces, count * chunk)[..., :tokens].reshape(targets.shape)

    @jax.checkpoint
    def piece(h: jax.Array, t: jax.Array) -> NamedTuple:
        return score(head(h), t)

    scores = jax.lax.map(lambda ht: piece(*ht), (fold(hidden), fold(targets)))
    return jax.tree.map(unfold, scores)
