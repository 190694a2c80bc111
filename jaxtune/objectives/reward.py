"""Reward models: losses of scalar scores, and how well the scores are calibrated."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from jaxtune.core.weighted import Weighted, weighted
from jaxtune.objectives.completions import Pair

CALIBRATION = "calibration/bin_"


def bradley_terry(scores: Pair, margin: jax.Array | float = 0.0) -> jax.Array:
    """Returns −log σ(s_chosen − s_rejected − m), [B, P] float32.

    Ouyang et al. 2022, arXiv:2203.02155, eq. 1; the margin of the pair, larger where the preference
    is clearer, is of Llama 2, arXiv:2307.09288, eq. 2.

    Args:
        scores: of the sides, each [B, P].
        margin: m, broadcast to [B, P].
    """
    return -jax.nn.log_sigmoid(scores.margin - margin)


def centring(scores: Pair) -> jax.Array:
    """Returns (s_chosen + s_rejected)², [B, P].

    A loss of differences leaves the scores' level free; this holds it at 0 (Eisenstein et al. 2023,
    arXiv:2312.09244).
    """
    return jnp.square(scores.chosen + scores.rejected)


def reward_loss(
    scores: Pair, weights: jax.Array, *, margin: jax.Array | float = 0.0, center: float = 0.0
) -> tuple[Weighted, dict[str, Weighted]]:
    """Returns (Σ weight · (Bradley–Terry + center · centring) with Σ weight over pairs, metrics).

    Args:
        scores: of the sides, each [B, P].
        weights: float32 [B, P].
        margin: of the pairs, broadcast to [B, P].
        center: coefficient of `centring`.

    Metrics: `rewards/…` as of `dpo.preference_metrics`, and `rewards/mean` over both sides. Add
    `calibration_gaps` where they are wanted.
    """
    losses = bradley_terry(scores, margin)
    if center:
        losses = losses + center * centring(scores)
    metrics = {
        "rewards/chosen": weighted(scores.chosen, weights),
        "rewards/rejected": weighted(scores.rejected, weights),
        "rewards/margin": weighted(scores.margin, weights),
        "rewards/accuracy": weighted(scores.margin > 0, weights),
        "rewards/mean": weighted((scores.chosen + scores.rejected) / 2, weights),
    }
    return weighted(losses, weights), metrics


def ranked_loss(
    scores: jax.Array,
    lists: jax.Array,
    ranks: jax.Array,
    weights: jax.Array,
    margin: jax.Array | float = 0.0,
) -> tuple[Weighted, dict[str, Weighted]]:
    """Returns (Σ of the lists' mean pairwise losses with their number, {"rewards/accuracy"}).

    Of a list of K completions, the mean of −log σ(s_i − s_j) over its pairs with i ranked before j
    (Ouyang et al. 2022, arXiv:2203.02155, eq. 1): every list has one vote, however long it is.
    Completions of equal rank make no pair. With lists of two it is `bradley_terry`.

    Args:
        scores: float32 [B, C].
        lists: int32 [B, C], the list that a completion belongs to in its row; 0 for none.
        ranks: [B, C], smaller is better.
        weights: float32 [B, C], the weight of its list on each completion.
        margin: by how much a completion is to be better than those behind it, broadcast to [B, C].
    """
    same = (lists[:, :, None] == lists[:, None, :]) & (lists > 0)[:, :, None]
    before = ranks[:, :, None] < ranks[:, None, :]
    ordered = same & before
    margins = scores[:, :, None] - scores[:, None, :]
    # Each pair has the weight of its list over the list's number of pairs.
    above = jnp.sum(ordered, axis=2, dtype=jnp.float32)
    number = jnp.sum(jnp.where(same, above[:, None, :], 0.0), axis=2)
    each = jnp.where(ordered, (weights / jnp.maximum(number, 1.0))[:, :, None], 0.0)
    return (
        weighted(-jax.nn.log_sigmoid(margins - jnp.asarray(margin)[..., None]), each),
        {"rewards/accuracy": weighted(margins > 0, each)},
    )


def step_loss(
    scores: jax.Array, labels: jax.Array, weights: jax.Array
) -> tuple[Weighted, dict[str, Weighted]]:
    """Returns (Σ binary cross-entropy with Σ weight over steps, {"accuracy"}): a process reward.

    A step's score is the log-odds that it is right (Lightman et al. 2023, arXiv:2305.20050).

    Args:
        scores: float32 [B, T], read where `weights` is not 0: at the steps' last tokens.
        labels: [B, T], 1 where the step is right, 0 where it is wrong.
        weights: float32 [B, T].
    """
    right = labels.astype(jnp.float32)
    scores = scores.astype(jnp.float32)
    losses = -right * jax.nn.log_sigmoid(scores) - (1 - right) * jax.nn.log_sigmoid(-scores)
    correct = (scores > 0) == (right > 0.5)
    return weighted(losses, weights), {"accuracy": weighted(correct, weights)}


def calibration_gaps(margin: jax.Array, weights: jax.Array, bins: int = 10) -> dict[str, Weighted]:
    """Returns how far confidence and accuracy of pairs are apart, as sums that add over batches.

    A score difference claims that its larger side is preferred with probability σ(|margin|), in
    [1/2, 1], which is cut into `bins` equal parts. Entry b, named CALIBRATION + b, holds
    Σ weight · (right − claimed) of the pairs in part b over the weight of all pairs. The expected
    calibration error is Σ_b |mean of entry b| (Guo et al. 2017, arXiv:1706.04599, eq. 3), which
    `calibration_error` takes once the batches are added up.

    Args:
        margin: s_chosen − s_rejected, [B, P].
        weights: float32 [B, P].
        bins: number of parts, static.
    """
    claimed = jax.nn.sigmoid(jnp.abs(margin))
    part = jnp.clip(jnp.floor((claimed - 0.5) * 2 * bins), 0, bins - 1)
    gap = (margin > 0) - claimed
    return {
        f"{CALIBRATION}{b}": weighted(jnp.where(part == b, gap, 0.0), weights) for b in range(bins)
    }


def calibration_error(means: Mapping[str, float]) -> float:
    """Returns the expected calibration error in [0, 1] from the means of `calibration_gaps`.

    Other entries of `means` are passed over.
    """
    return sum(abs(float(value)) for name, value in means.items() if CALIBRATION in name)
