"""Policy gradients with clipped importance ratios: PPO, GRPO and what came after.

    losses = clipped(log_ratio, advantages, low, high)      # a token, [B, T]
    loss = by_token(losses, weights)                        # or by_sequence, by_constant

Advantages and old log-probabilities have no gradient. Every normaliser is a `Weighted`, so that
the division happens once over the global batch and micro-batches change nothing (CORRECTNESS C1,
C24).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxtune.core.weighted import Weighted, weighted
from jaxtune.objectives import kl
from jaxtune.objectives.completions import averages, present, spread, totals

# Beyond e^±20 a ratio is an accident; held there, it cannot overflow and has no gradient.
LARGEST = 20.0


def token_log_ratio(logprobs: jax.Array, old_logprobs: jax.Array) -> jax.Array:
    """Returns log π − log π_old of each token, [B, T] (PPO, arXiv:1707.06347; GRPO, 2402.03300)."""
    return logprobs - jax.lax.stop_gradient(old_logprobs)


def mean_log_ratio(
    logprobs: jax.Array, old_logprobs: jax.Array, completions: jax.Array, count: int
) -> jax.Array:
    """Returns each completion's mean log-ratio of a token, on each of its tokens, [B, T].

    The length-normalised sequence ratio of GSPO (Zheng et al. 2025, arXiv:2507.18071, eq. 7). Each
    token then carries 1/|y| of the sequence's gradient, so that `by_sequence` gives eq. 5.

    Args:
        logprobs, old_logprobs: float32 [B, T].
        completions: int32 [B, T].
        count: C, static.
    """
    ratio = token_log_ratio(logprobs, old_logprobs)
    return spread(averages(ratio, completions, count), completions)


def total_log_ratio(
    logprobs: jax.Array, old_logprobs: jax.Array, completions: jax.Array, count: int
) -> jax.Array:
    """Returns each completion's summed log-ratio, on each of its tokens, [B, T].

    The whole completion is one action (RLOO, Ahmadian et al. 2024, arXiv:2402.14740); to
    be used with `by_sequence`. Arguments as for `mean_log_ratio`.
    """
    ratio = token_log_ratio(logprobs, old_logprobs)
    return spread(totals(ratio, completions, count), completions)


def clipped(
    log_ratio: jax.Array,
    advantages: jax.Array,
    low: float,
    high: float,
    dual: float | None = None,
) -> jax.Array:
    """Returns −min(r A, clip(r, 1 − low, 1 + high) A), [...] (PPO, arXiv:1707.06347, eq. 7).

    Args:
        log_ratio: log r, [...].
        advantages: A, broadcast to [...].
        low, high: clip range; `high` > `low` is DAPO's clip-higher (Yu et al. 2025,
            arXiv:2503.14476, eq. 10).
        dual: c > 1 bounds the loss of a negative advantage at −c A, which the ratio alone does not
            (Ye et al. 2019, arXiv:1912.09729); None for no bound.
    """
    advantages = jax.lax.stop_gradient(advantages)
    ratio = jnp.exp(jnp.clip(log_ratio, -LARGEST, LARGEST))
    losses = -jnp.minimum(ratio * advantages, jnp.clip(ratio, 1 - low, 1 + high) * advantages)
    if dual is None:
        return losses
    return jnp.where(advantages < 0, jnp.minimum(losses, -dual * advantages), losses)


def by_token(losses: jax.Array, weights: jax.Array) -> Weighted:
    """Returns Σ losses over the tokens with their number: all tokens of the batch count alike.

    PPO's mean, and DAPO's (arXiv:2503.14476, eq. 12). `losses`, `weights`: float32 [B, T].
    """
    return weighted(losses, weights)


def by_sequence(
    losses: jax.Array, weights: jax.Array, completions: jax.Array, count: int
) -> Weighted:
    """Returns Σ of the completions' means with their number: GRPO (arXiv:2402.03300, eq. 3).

    A completion whose weights are all 0 counts as one with the mean 0; one that has no token in
    `completions` doesn't count.

    Args:
        losses, weights: float32 [B, T].
        completions: int32 [B, T].
        count: C, static.
    """
    sums = totals(jnp.where(weights == 0, 0.0, losses * weights), completions, count)
    means = sums / divisor(totals(weights, completions, count))
    return weighted(means, present(completions, count))


def by_constant(
    losses: jax.Array, weights: jax.Array, completions: jax.Array, count: int, length: int
) -> Weighted:
    """Returns Σ losses with the number of completions times a constant length: Dr. GRPO.

    No completion's length changes the weight of its tokens (Liu et al. 2025,
    arXiv:2503.20783).

    Args:
        losses, weights: float32 [B, T].
        completions: int32 [B, T].
        count: C, static.
        length: the constant, as a rule the most tokens that are sampled.
    """
    number = jnp.sum(present(completions, count), dtype=jnp.float32)
    return Weighted(weighted(losses, weights).sum, number * length)


def divisor(weights: jax.Array) -> jax.Array:
    """Returns weights, and 1 where they are 0."""
    return jnp.where(weights == 0, 1.0, weights)


def policy_metrics(
    log_ratio: jax.Array, advantages: jax.Array, weights: jax.Array, low: float, high: float
) -> dict[str, Weighted]:
    """Returns what is logged of a policy step, means over tokens.

    `clip_share/low` and `/high`, the tokens whose gradient the clip stops below and above, and
    `clip_share`, both; `ratio` (1 at the first epoch); `old_kl`, k3 of the sampling policy from the
    present one.

    Args:
        log_ratio, advantages, weights: [B, T].
        low, high: as of `clipped`.
    """
    log_ratio = jax.lax.stop_gradient(jnp.clip(log_ratio, -LARGEST, LARGEST))
    ratio = jnp.exp(log_ratio)
    below = (ratio < 1 - low) & (advantages < 0)
    above = (ratio > 1 + high) & (advantages > 0)
    return {
        "clip_share": weighted(below | above, weights),
        "clip_share/low": weighted(below, weights),
        "clip_share/high": weighted(above, weights),
        "ratio": weighted(ratio, weights),
        "old_kl": weighted(kl.k3(jnp.zeros_like(log_ratio), log_ratio), weights),
    }


def entropy_term(entropy: jax.Array, weights: jax.Array, coefficient: float) -> Weighted:
    """Returns −coefficient · Σ entropy with the number of tokens: an entropy bonus as a term.

    Args:
        entropy: float32 [B, T], nats, of the policy at the position that predicts the token.
        weights: float32 [B, T].
        coefficient: of the bonus, ≥ 0.
    """
    term = weighted(entropy, weights)
    return Weighted(-coefficient * term.sum, term.weight)
