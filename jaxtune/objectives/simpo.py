"""Simple preference optimization: average log-probabilities with a target margin, no reference."""

from __future__ import annotations

import jax

from jaxtune.core.weighted import Weighted, weighted
from jaxtune.objectives.completions import Pair
from jaxtune.objectives.dpo import preference_metrics, sigmoid


def simpo_loss(
    averages: Pair,
    weights: jax.Array,
    *,
    beta: float,
    gamma: float,
    label_smoothing: float = 0.0,
) -> tuple[Weighted, dict[str, Weighted]]:
    """Returns (Σ −log σ(β (a_chosen − a_rejected) − γ) · weight with Σ weight over pairs, metrics).

    Meng et al. 2024, arXiv:2405.14734, eq. 6.

    Args:
        averages: mean log-probability of a token in each side, each [B, P].
        weights: float32 [B, P].
        beta: scale of the rewards, > 0.
        gamma: target margin of the rewards (the paper's γ, not γ / β).
        label_smoothing: as in `dpo.sigmoid`.
    """
    losses = sigmoid(averages.margin - gamma / beta, beta, label_smoothing)
    rewards = Pair(beta * averages.chosen, beta * averages.rejected)
    return weighted(losses, weights), preference_metrics(rewards, averages, weights)
