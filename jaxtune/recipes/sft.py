"""Supervised fine-tuning and pretraining: the loss of a batch under a model."""

from __future__ import annotations

import functools
from typing import Any

import jax

from jaxtune.core.tree import Tree, combine
from jaxtune.core.weighted import Weighted
from jaxtune.models import decoder
from jaxtune.models.config import ModelConfig
from jaxtune.objectives.logprobs import LOGITS_BYTES, shift, token_scores
from jaxtune.objectives.sft import next_token_loss, router_balance
from jaxtune.parallel.sequence import balanced, sequence_shards
from jaxtune.peft.method import Method
from jaxtune.recipes.assemble import Parts
from jaxtune.recipes.objective import Objective
from jaxtune.training.step import SumLoss

SPREAD_HEAD = 4  # times LOGITS_BYTES: about a thousand tokens of a vocabulary of 128k


def sft_loss(config: ModelConfig, method: Method, shards: int, balance: float = 0.0) -> SumLoss:
    """Returns the summed next-token loss of a batch; see `training.step.SumLoss`.

    Args:
        config, method: the model.
        shards: over how many devices the rows of a batch are spread.
        balance: coefficient of the load-balancing loss of a model with experts, which is a metric
            in any case.
    """

    def sum_loss(
        trainable: Tree, frozen: Tree, batch: dict[str, jax.Array], key: jax.Array | None
    ) -> tuple[Weighted, dict[str, Weighted]]:
        params = combine(trainable, decoder.with_gathered_head(config, frozen))
        targets, weights = shift(batch)
        batch = balanced(batch | {"targets": targets, "weights": weights})
        targets, weights = batch.pop("targets"), batch.pop("weights")
        hidden = decoder.hidden_states(config, method, params, batch, key=key)
        head = functools.partial(decoder.logits, config, method, params, key=key)
        scores = token_scores(
            head,
            hidden.states,
            targets,
            config.vocab_size,
            logits_bytes=chunk_bytes(config, trainable, shards),
            shards=shards,
            pieces=sequence_shards(),
        )
        loss, metrics = next_token_loss(scores, weights)
        if hidden.balance is not None:
            uneven = router_balance(hidden.balance, weights)
            metrics["router_balance"] = uneven
            loss = Weighted(loss.sum + balance * uneven.sum, loss.weight)
        return loss, metrics

    return sum_loss


def chunk_bytes(config: ModelConfig, trainable: Tree, shards: int) -> int:
    """Returns the most bytes of logits that the loss makes at a time on a device.

    A trained head that is spread over devices is gathered, and its gradient is summed, once in
    every chunk: there are fewer and larger ones, so that products hide the transfers.

    Args:
        config: the model.
        trainable: the trained parameters, None elsewhere; arrays or shapes.
        shards: over how many devices the rows of a batch are spread.
    """
    node, leaf = decoder.head_path(config)
    spread = shards > 1 and trainable.get(node, {}).get(leaf) is not None
    return SPREAD_HEAD * LOGITS_BYTES if spread else LOGITS_BYTES


def trained_loss(config: Any, parts: Parts, shards: int) -> SumLoss:
    """Returns the loss that a run of the resolved config minimises."""
    return sft_loss(parts.config, parts.method, shards, config.objective.balance)


def held_out_loss(config: Any, parts: Parts, shards: int) -> SumLoss:
    """Returns the next-token loss alone."""
    return sft_loss(parts.config, parts.method, shards)


OBJECTIVE = Objective(trained=trained_loss, held_out=held_out_loss, likelihood=True)
