"""Kahneman–Tversky optimization: completions that are each said to be good or bad."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxtune.core.weighted import Weighted, weighted


def reference_point(log_ratios: jax.Array, weights: jax.Array) -> jax.Array:
    """Returns z₀ = max(0, mean of log π(y′|x) − log π_ref(y′|x)), a float32 scalar, no gradient.

    y′ are completions of other prompts of the batch, so z₀ is a biased estimate of the KL
    divergence of policy and reference (arXiv:2402.01306, sec. 4). It is one number for
    the whole global batch: it has to be found before the step, from the state that the step starts
    with, since a value a micro-batch would change the loss with their number (CORRECTNESS C1).

    Args:
        log_ratios: [B, C] of mismatched completions, summed over tokens.
        weights: float32 [B, C], 0 where there is none.
    """
    mean = weighted(log_ratios, weights).mean()
    return jax.lax.stop_gradient(jnp.maximum(mean, 0.0))


def kto_loss(
    log_ratios: jax.Array,
    desirable: jax.Array,
    weights: jax.Array,
    z0: jax.Array | float,
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> tuple[Weighted, dict[str, Weighted]]:
    """Returns (Σ weight · λ (1 − σ(±β (r − z₀))) with Σ weight over completions, metrics).

    + and λ_D for desirable completions, − and λ_U for the others (Ethayarajh et al. 2024,
    arXiv:2402.01306, sec. 4). With z₀ = 0 it is APO-zero on unpaired data (D'Oosterlinck et al.
    2024, arXiv:2408.06266, eq. 7).

    Args:
        log_ratios: r = log π(y|x) − log π_ref(y|x), [B, C], summed over tokens.
        desirable: [B, C], 1 or 0.
        weights: float32 [B, C], 0 where there is no completion.
        z0: the reference point, broadcast to [B, C]; see `reference_point`.
        beta: strength of the pull towards the reference, > 0.
        desirable_weight, undesirable_weight: λ_D and λ_U.

    Metrics: `rewards/desirable`, `rewards/undesirable` (β r) and `kl` (z₀).
    """
    good = desirable.astype(jnp.float32)
    gain = beta * (log_ratios - jax.lax.stop_gradient(z0))
    scale = jnp.where(good > 0, desirable_weight, undesirable_weight)
    losses = scale * jax.nn.sigmoid(jnp.where(good > 0, -gain, gain))
    rewards = beta * log_ratios
    metrics = {
        "rewards/desirable": weighted(rewards, weights * good),
        "rewards/undesirable": weighted(rewards, weights * (1.0 - good)),
        "kl": weighted(jnp.broadcast_to(z0, losses.shape), weights),
    }
    return weighted(losses, weights), metrics
