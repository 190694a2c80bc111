"""Supervised fine-tuning and pretraining: the loss of a batch under a model."""

from __future__ import annotations

from typing import Any

import jax

from jaxtune.core.tree import Tree, combine
from jaxtune.core.weighted import Weighted
from jaxtune.models import decoder
from jaxtune.models.config import ModelConfig
from jaxtune.objectives.sft import next_token_loss, router_balance
from jaxtune.peft.method import Method
from jaxtune.recipes.assemble import Parts
from jaxtune.recipes.objective import Objective
from jaxtune.recipes.retention.keep import NAME, Keep, keep_of
from jaxtune.recipes.rows import Rows
from jaxtune.recipes.scores import chunk_bytes, predictions
from jaxtune.training.step import Loss, SumLoss

TERM = "sft"


def sft_loss(
    config: ModelConfig,
    method: Method,
    shards: int,
    balance: float = 0.0,
    keep: Keep | None = None,
) -> SumLoss:
    """Returns the summed next-token loss of a batch; see `training.step.SumLoss`.

    Args:
        config, method: the model.
        shards: over how many devices the rows of a batch are spread.
        balance: coefficient of the load-balancing loss of a model with experts, which is a metric
            in any case.
        keep: a further term; None: none.
    """

    def sum_loss(
        trainable: Tree, frozen: Tree, batch: dict[str, jax.Array], key: jax.Array | None
    ) -> tuple[Loss, dict[str, Weighted]]:
        params = combine(trainable, decoder.with_gathered_head(config, frozen))
        size = chunk_bytes(config, trainable, shards)
        found = predictions(config, method, params, batch, key, shards=shards, logits_bytes=size)
        weights = found.batch["loss_mask"]
        loss, metrics = next_token_loss(found.scores, weights)
        if found.balance is not None:
            uneven = router_balance(found.balance, weights)
            metrics["router_balance"] = uneven
            loss = Weighted(loss.sum + balance * uneven.sum, loss.weight)
        if keep is None:
            return loss, metrics
        return {TERM: loss, NAME: keep(params, batch, found, key)}, metrics

    return sum_loss


def trained_loss(config: Any, parts: Parts, rows: Rows) -> SumLoss:
    """Returns the loss that a run of the resolved config minimises."""
    keep = keep_of(config, parts, rows.shards)
    return sft_loss(parts.config, parts.method, rows.shards, config.objective.balance, keep)


def held_out_loss(config: Any, parts: Parts, rows: Rows) -> SumLoss:
    """Returns the next-token loss alone."""
    return sft_loss(parts.config, parts.method, rows.shards)


OBJECTIVE = Objective(trained=trained_loss, held_out=held_out_loss, term=TERM, likelihood=True)
