"""Odds-ratio preference optimization: no reference model."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxtune.core.weighted import Weighted, weighted
from jaxtune.objectives.completions import Pair
from jaxtune.objectives.dpo import preference_metrics


def log_odds(logprobs: jax.Array) -> jax.Array:
    """Returns log(p / (1 − p)) of log p < 0, [...] float32.

    1 − p is taken as −expm1(log p), which keeps its digits where p is near 1, and p is held below
    1 − 1e-7: a completion that is certain has no finite odds.
    """
    x = jnp.minimum(logprobs, -1e-7)
    return x - jnp.log(-jnp.expm1(x))


def odds_ratio_term(
    averages: Pair, weights: jax.Array, coefficient: float
) -> tuple[Weighted, dict[str, Weighted]]:
    """Returns (Σ −λ log σ(log odds ratio) · weight with Σ weight over pairs, metrics).

    The odds are of P(y|x) = exp(mean log-probability of a token). ORPO's loss is this term and the
    likelihood of the chosen completions, `dpo.nll_term(…, 1.0)` (Hong et al. 2024,
    arXiv:2403.07691, eq. 6–7).

    Args:
        averages: mean log-probability of a token in each side, each [B, P].
        weights: float32 [B, P].
        coefficient: λ.
    """
    ratio = log_odds(averages.chosen) - log_odds(averages.rejected)
    term = weighted(-coefficient * jax.nn.log_sigmoid(ratio), weights)
    rewards = Pair(coefficient * averages.chosen, coefficient * averages.rejected)
    metrics = preference_metrics(rewards, averages, weights)
    return term, metrics | {"log_odds_ratio": weighted(ratio, weights)}
