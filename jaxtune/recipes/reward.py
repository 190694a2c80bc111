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
from jaxtune.recipes.preference import most_completions
from jaxtune.recipes.rows import UNKNOWN, Rows
from jaxtune.training.step import Loss, Metrics, SumLoss

Batch = dict[str, jax.Array]
# (scores float32 [B, T], batch) → (loss, metrics)
OfScores = Callable[[jax.Array, Batch], tuple[Weighted, Metrics]]


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
    ) -> tuple[Loss, Metrics]:
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


def of_batch(
    scores: jax.Array,
    batch: Batch,
    *,
    centering: float = 0.0,
    calibrated: bool = False,
    rows: Rows = UNKNOWN,
) -> tuple[Weighted, Metrics]:
    """Returns the loss of scores for what the batch holds: pairs, ranked lists or judged steps.

    Args:
        scores: float32 [B, T].
        batch: its keys tell which, see `data.columns`.
        centering: coefficient of `objectives.reward.centring`, of pairs.
        calibrated: add what the calibration error of pairs is made of to the metrics.
        rows: what is known of the rows.
    """
    if "label" in batch:
        return of_steps(scores, batch)
    if "groups" in batch:
        return of_lists(scores, batch, rows)
    return of_pairs(scores, batch, centering, calibrated, rows)


def of_pairs(
    scores: jax.Array, batch: Batch, centering: float, calibrated: bool, rows: Rows
) -> tuple[Weighted, Metrics]:
    """Returns the Bradley–Terry loss of chosen and rejected, each scored at its last token.

    Reads `completions`, `positions`, `example_weight` and `margin`; see `of_batch`.
    """
    completions = batch["completions"]
    count = most_completions(rows, scores.shape[1])
    sides = pairs(at_last(scores, completions, batch["positions"], count))
    weights = pair_weights(completions, count, batch["example_weight"])
    margin = pairs(of_completion(batch["margin"], completions, count)).chosen
    loss, metrics = reward_loss(sides, weights, margin=margin, center=centering)
    if calibrated:
        metrics = metrics | calibration_gaps(sides.margin, weights)
    return loss, named(metrics)


def of_lists(scores: jax.Array, batch: Batch, rows: Rows) -> tuple[Weighted, Metrics]:
    """Returns the pairwise loss of ranked completions, which follow one another, the best first.

    Reads `completions`, `groups`, `positions`, `example_weight` and `margin`; a pair among the data
    is a list of two.
    """
    completions = batch["completions"]
    # A list may be long, and its completions share a prompt.
    count = rows.most_completions(1, scores.shape[1])
    lists = of_completion(batch["groups"], completions, count).astype(jnp.int32)
    ranks = jnp.broadcast_to(jnp.arange(count), lists.shape)
    weights = of_completion(batch["example_weight"], completions, count)
    ends = at_last(scores, completions, batch["positions"], count)
    margin = of_completion(batch["margin"], completions, count)
    loss, metrics = ranked_loss(ends, lists, ranks, weights, margin)
    return loss, named(metrics)


def of_steps(scores: jax.Array, batch: Batch) -> tuple[Weighted, Metrics]:
    """Returns the cross-entropy of judged steps, each scored at its last token.

    Reads `label`, `example_weight` and `loss_mask`, which is not 0 at those tokens alone.
    """
    weights = jnp.where(batch["loss_mask"] > 0, batch["example_weight"], 0.0)
    return step_loss(scores, batch["label"], weights)


def named(metrics: dict[str, Weighted]) -> dict[str, Weighted]:
    """Returns metrics by the names that a run logs: `accuracy`, not `rewards/accuracy`.

    >>> list(named({"rewards/accuracy": 1, "calibration/bin_0": 2}))
    ['accuracy', 'calibration/bin_0']
    """
    return {name.removeprefix("rewards/"): value for name, value in metrics.items()}


def trained_loss(config: Any, parts: Parts, rows: Rows) -> SumLoss:
    """Returns the loss that a run of the resolved config minimises."""
    of_scores = functools.partial(of_batch, centering=config.objective.centering, rows=rows)
    return scored_loss(parts.config, parts.method, of_scores, config.objective.balance)


def held_out_loss(config: Any, parts: Parts, rows: Rows) -> SumLoss:
    """Returns the loss without centring, with accuracy and calibration."""
    del config
    return measured_loss(parts.config, parts.method, rows)


def measured_loss(config: ModelConfig, method: Method, rows: Rows = UNKNOWN) -> SumLoss:
    """Returns the loss by which a reward model is measured, with accuracy and calibration."""
    return scored_loss(config, method, functools.partial(of_batch, calibrated=True, rows=rows))


OBJECTIVE = Objective(trained=trained_loss, held_out=held_out_loss, term="reward", likelihood=False)
