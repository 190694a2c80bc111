"""Reward models: the loss of the scores of completions, or of steps."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxtune.core.tree import Tree, combine
from jaxtune.core.weighted import Weighted
from jaxtune.models import decoder
from jaxtune.models.config import ModelConfig
from jaxtune.objectives.completions import at_last, of_completion, pair_weights, pairs
from jaxtune.objectives.reward import calibration_gaps, ranked_loss, reward_loss, step_loss
from jaxtune.objectives.sft import router_balance
from jaxtune.parallel.sequence import balanced
from jaxtune.peft.method import Method
from jaxtune.recipes.assemble import Parts
from jaxtune.recipes.objective import Objective
from jaxtune.training.step import Loss, SumLoss

Batch = dict[str, jax.Array]
# (scores float32 [B, T], batch) → (loss, metrics)
OfScores = Callable[[jax.Array, Batch], tuple[Weighted, dict[str, Weighted]]]
FORMATS = ("preference", "ranked", "stepwise")


def scored_loss(
    config: ModelConfig, method: Method, of_scores: OfScores, balance: float = 0.0
) -> SumLoss:
    """Returns the loss of a batch's scores; see `training.step.SumLoss`.

    Args:
        config, method: a model with a score head.
        of_scores: the loss of the scores at all tokens.
        balance: coefficient of the load-balancing loss of a model with experts.
    """

    def sum_loss(
        trainable: Tree, frozen: Tree, batch: Batch, key: jax.Array | None
    ) -> tuple[Loss, dict[str, Weighted]]:
        params, batch = combine(trainable, frozen), balanced(batch)
        hidden = decoder.hidden_states(config, method, params, batch, key=key)
        loss, metrics = of_scores(decoder.scores(config, method, params, hidden.states), batch)
        if hidden.balance is None:
            return loss, metrics
        uneven = router_balance(hidden.balance, batch["loss_mask"])
        metrics = metrics | {"router_balance": uneven}
        if not balance:
            return loss, metrics
        return {"reward": loss, "balance": Weighted(balance * uneven.sum, uneven.weight)}, metrics

    return sum_loss


def of_pairs(
    scores: jax.Array, batch: Batch, *, packed: bool, centering: float, calibrated: bool
) -> tuple[Weighted, dict[str, Weighted]]:
    """Returns the Bradley–Terry loss of chosen and rejected, each scored at its last token.

    Args:
        scores: float32 [B, T].
        batch: `completions`, `positions`, `example_weight` and `margin`, all [B, T].
        packed: rows may hold several pairs.
        centering: coefficient of `objectives.reward.centring`.
        calibrated: add what the calibration error is made of to the metrics.
    """
    completions = batch["completions"]
    count = most_completions(scores.shape[1]) if packed else 2
    sides = pairs(at_last(scores, completions, batch["positions"], count))
    weights = pair_weights(completions, count, batch["example_weight"])
    margin = pairs(of_completion(batch["margin"], completions, count)).chosen
    loss, metrics = reward_loss(sides, weights, margin=margin, center=centering)
    if calibrated:
        metrics = metrics | calibration_gaps(sides.margin, weights)
    return loss, named(metrics)


def of_lists(scores: jax.Array, batch: Batch) -> tuple[Weighted, dict[str, Weighted]]:
    """Returns the pairwise loss of ranked completions, which follow one another, the best first.

    Args:
        scores: float32 [B, T].
        batch: `completions`, `groups`, `positions` and `example_weight`, all [B, T].
    """
    completions = batch["completions"]
    count = most_completions(scores.shape[1])
    lists = of_completion(batch["groups"], completions, count).astype(jnp.int32)
    ranks = jnp.broadcast_to(jnp.arange(count), lists.shape)
    weights = of_completion(batch["example_weight"], completions, count)
    ends = at_last(scores, completions, batch["positions"], count)
    loss, metrics = ranked_loss(ends, lists, ranks, weights)
    return loss, named(metrics)


def of_steps(scores: jax.Array, batch: Batch) -> tuple[Weighted, dict[str, Weighted]]:
    """Returns the cross-entropy of judged steps, each scored at its last token.

    Args:
        scores: float32 [B, T].
        batch: `label`, `example_weight` and `loss_mask`, all [B, T]; the last is not 0 at the last
            token of each step alone.
    """
    weights = jnp.where(batch["loss_mask"] > 0, batch["example_weight"], 0.0)
    return step_loss(scores, batch["label"], weights)


def named(metrics: dict[str, Weighted]) -> dict[str, Weighted]:
    """Returns metrics by the names that a run logs: `accuracy`, not `rewards/accuracy`.

    >>> list(named({"rewards/accuracy": 1, "calibration/bin_0": 2}))
    ['accuracy', 'calibration/bin_0']
    """
    return {name.removeprefix("rewards/"): value for name, value in metrics.items()}


def most_completions(tokens: int) -> int:
    """Returns an even number that the completions of a row of so many tokens do not exceed."""
    return tokens + tokens % 2


def of_format(
    format: str, *, packed: bool = False, centering: float = 0.0, calibrated: bool = False
) -> OfScores:
    """Returns the loss of scores for data of a format; see `of_pairs`, `of_lists`, `of_steps`."""
    if format == "ranked":
        return of_lists
    if format == "stepwise":
        return of_steps
    return functools.partial(of_pairs, packed=packed, centering=centering, calibrated=calibrated)


def format_of(config: Any) -> str:
    """Returns the format that all data of a resolved config have."""
    return config.data.train[0].format


def trained_loss(config: Any, parts: Parts, shards: int) -> SumLoss:
    """Returns the loss that a run of the resolved config minimises."""
    del shards
    of_scores = of_format(
        format_of(config), packed=config.data.packing, centering=config.objective.centering
    )
    return scored_loss(parts.config, parts.method, of_scores, config.objective.balance)


def held_out_loss(config: Any, parts: Parts, shards: int) -> SumLoss:
    """Returns the loss without centring, with accuracy and calibration."""
    del shards
    return scored_loss(parts.config, parts.method, of_format(format_of(config), calibrated=True))


OBJECTIVE = Objective(trained=trained_loss, held_out=held_out_loss, likelihood=False)
