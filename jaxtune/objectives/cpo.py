"""Contrastive preference optimization: DPO without its reference, beside behaviour cloning."""

from __future__ import annotations

import jax

from jaxtune.core.weighted import Weighted, weighted
from jaxtune.objectives.completions import Pair
from jaxtune.objectives.dpo import preference_metrics, sigmoid


def cpo_term(
    policy: Pair, weights: jax.Array, *, beta: float, label_smoothing: float = 0.0
) -> tuple[Weighted, dict[str, Weighted]]:
    """Returns (Σ −log σ(β (log π(y_chosen|x) − log π(y_rejected|x))) · weight, metrics).

    CPO's loss is this term and the likelihood of the chosen completions, `dpo.nll_term` (Xu et
    al. 2024, arXiv:2401.08417).

    Args:
        policy: log-probabilities of the completions, summed over tokens, each [B, P].
        weights: float32 [B, P].
        beta: scale of the margin, > 0.
        label_smoothing: as in `dpo.sigmoid`.
    """
    losses = sigmoid(policy.margin, beta, label_smoothing)
    rewards = Pair(beta * policy.chosen, beta * policy.rejected)
    return weighted(losses, weights), preference_metrics(rewards, policy, weights)
