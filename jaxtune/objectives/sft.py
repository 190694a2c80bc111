"""Supervised fine-tuning and pretraining: the next-token loss."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxtune.core.weighted import Weighted, weighted
from jaxtune.objectives.logprobs import Scores


def next_token_loss(scores: Scores, weights: jax.Array) -> tuple[Weighted, dict[str, Weighted]]:
    """Returns (Σ −log p · weight with Σ weight, {"accuracy"}).

    Args:
        scores: of the targets, each [B, T].
        weights: float32 [B, T], 0 where a position has no target.
    """
    return weighted(-scores.logprobs, weights), {"accuracy": weighted(scores.correct, weights)}


def router_balance(uneven: jax.Array, weights: jax.Array) -> Weighted:
    """Returns the load-balancing loss of the batch, its rows weighted as in `next_token_loss`.

    Divided by the same weight as the loss, the sum of both does not depend on how the rows are
    divided among micro-batches and devices.

    Args:
        uneven: float32 [B], of each row; see `models.experts.balance`.
        weights: float32 [B, T], of the targets.
    """
    return weighted(uneven, jnp.sum(weights.astype(jnp.float32), axis=1))
