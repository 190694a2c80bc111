"""Distillation: a model learns a teacher's distribution of each target token."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxtune.core.tree import Tree, combine
from jaxtune.core.weighted import Weighted, weighted
from jaxtune.models import decoder
from jaxtune.objectives import distill as measures
from jaxtune.objectives.sft import router_balance
from jaxtune.parallel.sequence import balanced, sequence_shards
from jaxtune.recipes import teacher_data
from jaxtune.recipes.assemble import Parts
from jaxtune.recipes.base import BASE
from jaxtune.recipes.objective import Objective
from jaxtune.recipes.scores import (
    INPUTS,
    chunk_bytes,
    predicting_states,
    predictions,
)
from jaxtune.recipes.teacher import apart
from jaxtune.training.step import Batch, Loss, Metrics, SumLoss


def divergence_of(objective: Any) -> measures.Divergence:
    """Returns the divergence that a resolved `objective` section names."""
    if objective.divergence == "jsd":
        return measures.jsd(objective.mixture)
    return {"forward": measures.forward_kl, "reverse": measures.reverse_kl}[objective.divergence]


def teacher_inputs(batch: Batch, num_virtual: int) -> Batch:
    """Returns what the teacher reads: the student's virtual tokens are padding to it."""
    inputs = balanced({name: batch[name] for name in INPUTS if name in batch})
    virtual = inputs.pop("virtual", None)
    if virtual is not None:
        inputs["segment_ids"] = jnp.where(virtual >= 0, 0, inputs["segment_ids"])
        inputs["positions"] = jnp.maximum(inputs["positions"] - num_virtual, 0)
    return inputs


def loss_of(config: Any, parts: Parts, shards: int, balance: float) -> SumLoss:
    """Returns the summed loss of a batch; see `training.step.SumLoss`.

    T² times the divergence at temperature T, a mean over targets, so that gradients keep their
    size (Hinton et al. 2015, arXiv:1503.02531), and `nll_weight` times the NLL of the targets.
    """
    objective, student, teacher = config.objective, parts.config, parts.teacher
    measure, temperature = divergence_of(objective), objective.teacher_temperature

    def divergences(
        head: Any, states: jax.Array, held: Tree, batch: Batch, moved: Batch, size: int
    ) -> jax.Array:
        options = {"temperature": temperature, "logits_bytes": size, "shards": shards}
        options["pieces"] = sequence_shards()
        if teacher is None:
            return measures.top_k_divergences(
                measure,
                (head, states),
                moved[teacher_data.IDS],
                moved[teacher_data.LOGPROBS],
                student.vocab_size,
                **options,
            )
        inputs = teacher_inputs(batch, parts.method.num_virtual)
        theirs = predicting_states(teacher, BASE, held, inputs).states
        other = functools.partial(decoder.logits, teacher, BASE, held)
        return measures.token_divergences(
            measure, (head, states), (other, theirs), student.vocab_size, **options
        )

    def sum_loss(
        trainable: Tree, frozen: Tree, batch: Batch, key: jax.Array | None
    ) -> tuple[Loss, Metrics]:
        held = None
        if teacher is not None:
            frozen, held = apart(frozen)
            held = decoder.with_gathered_head(teacher, held)
        params = combine(trainable, decoder.with_gathered_head(student, frozen))
        size = chunk_bytes(student, trainable, shards)
        found = predictions(
            student, parts.method, params, batch, key, shards=shards, logits_bytes=size
        )
        weights = found.batch["loss_mask"]
        head = functools.partial(decoder.logits, student, parts.method, params, key=key)
        values = divergences(head, found.hidden, held, batch, found.batch, size)
        nll = weighted(-found.scores.logprobs, weights)
        metrics = {"accuracy": weighted(found.scores.correct, weights), "nll": nll}
        losses = {"distill": measures.distillation_loss(values, weights, temperature**2)}
        if objective.nll_weight:
            losses["nll"] = Weighted(objective.nll_weight * nll.sum, nll.weight)
        if found.balance is not None:
            uneven = router_balance(found.balance, weights)
            metrics["router_balance"] = uneven
            if balance:
                losses["balance"] = Weighted(balance * uneven.sum, uneven.weight)
        return losses["distill"] if len(losses) == 1 else losses, metrics

    return sum_loss


OBJECTIVE = Objective(
    trained=lambda config, parts, rows: loss_of(
        config, parts, rows.shards, config.objective.balance
    ),
    held_out=lambda config, parts, rows: loss_of(config, parts, rows.shards, 0.0),
    term="distill",
    likelihood=False,
    open_data=teacher_data.open_data,
    open_feed=teacher_data.open_feed,
    evaluate=teacher_data.evaluate,
    padding=teacher_data.padding,
)
