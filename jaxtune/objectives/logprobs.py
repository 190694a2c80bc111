"""Log-probabilities of given tokens, without the [B, T, V] array."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxtune.objectives import kl
from jaxtune.objectives.chunks import LOGITS_BYTES, in_chunks

Head = Callable[[jax.Array], jax.Array]  # hidden [B, t, D] → float32 logits [B, t, V]


class Scores(NamedTuple):
    """Of each target token: its log-probability, and whether it is the most likely one."""

    logprobs: jax.Array
    correct: jax.Array


class PolicyScores(NamedTuple):
    """Of each target token [B, T]: what an online objective asks of the policy.

    Attributes:
        logprobs: its log-probability.
        entropy: of the distribution that it was drawn from, nats.
        kl: exact KL of that distribution from the reference's, nats; None without a reference.
    """

    logprobs: jax.Array
    entropy: jax.Array
    kl: jax.Array | None


def at_predictor(values: jax.Array) -> jax.Array:
    """Returns values [B, T, …] of tokens, moved to the position before, which predicts them.

    The last position predicts nothing and has 0.
    """
    return jnp.pad(values[:, 1:], ((0, 0), (0, 1), *((0, 0),) * (values.ndim - 2)))


def shift(batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Returns (targets, weights) [B, T] of the prediction made at each position.

    Position t predicts token t + 1; the last position predicts nothing. `loss_mask` weighs a
    token as a target, so it moves with it.

    >>> import jax.numpy as jnp
    >>> batch = {"input_ids": jnp.array([[5, 6, 7]]), "loss_mask": jnp.array([[0.0, 1.0, 1.0]])}
    >>> [a.tolist() for a in shift(batch)]
    [[[6, 7, 0]], [[1.0, 1.0, 0.0]]]
    """
    return at_predictor(batch["input_ids"]), at_predictor(batch["loss_mask"])


def plain_scores(logits: jax.Array, targets: jax.Array) -> Scores:
    """Returns the Scores of targets [...] under float32 logits [..., V]: the oracle."""
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    logprobs = chosen - jax.nn.logsumexp(logits, axis=-1)
    return Scores(logprobs, chosen >= jnp.max(logits, axis=-1))


def entropy(logits: jax.Array) -> jax.Array:
    """Returns the entropy [...] in nats of float32 logits [..., V]; −inf rules a token out."""
    logp = jax.nn.log_softmax(logits, axis=-1)
    inside = logp > -jnp.inf
    return -jnp.sum(jnp.exp(logp) * jnp.where(inside, logp, 0.0), axis=-1)


def token_scores(
    head: Head,
    hidden: jax.Array,
    targets: jax.Array,
    vocab_size: int,
    *,
    logits_bytes: int = LOGITS_BYTES,
    shards: int = 1,
    pieces: int = 1,
) -> Scores:
    """Returns the Scores [B, T] of targets under head(hidden).

    Args:
        head: hidden [B, t, D] → float32 logits [B, t, V].
        hidden: [B, T, D].
        targets: int32 [B, T].
        vocab_size: V.
        logits_bytes, shards, pieces: see `chunks.in_chunks`.
    """
    return in_chunks(
        lambda x: plain_scores(head(x[0]), x[1]),
        (hidden, targets),
        vocab_size,
        logits_bytes=logits_bytes,
        shards=shards,
        pieces=pieces,
    )


def policy_scores(
    head: Head,
    hidden: jax.Array,
    targets: jax.Array,
    vocab_size: int,
    *,
    temperature: float = 1.0,
    train_entropy: bool = False,
    reference: tuple[Head, jax.Array] | None = None,
    **chunks: Any,
) -> PolicyScores:
    """Returns the PolicyScores [B, T] of targets under head(hidden) / temperature.

    Args:
        head, hidden, targets, vocab_size: as for `token_scores`.
        temperature: that the targets were sampled with: the log-probabilities are the sampler's
            (CORRECTNESS C25).
        train_entropy: whether the entropy has a gradient, which costs about as much again as that
            of the log-probabilities; not needed where it is only logged.
        reference: head and hidden [B, T, D′] of another model with the same vocabulary, to whose
            distribution at the same temperature `kl` is measured; it has no gradient.
        chunks: as of `chunks.in_chunks`.
    """

    def piece(x: tuple) -> PolicyScores:
        logits = head(x[0]) / temperature
        spread = entropy(logits if train_entropy else jax.lax.stop_gradient(logits))
        exact = None if reference is None else kl.exact(logits, reference[0](x[2]) / temperature)
        return PolicyScores(plain_scores(logits, x[1]).logprobs, spread, exact)

    others = () if reference is None else (jax.lax.stop_gradient(reference[1]),)
    return in_chunks(piece, (hidden, targets, *others), vocab_size, heads=1 + len(others), **chunks)
