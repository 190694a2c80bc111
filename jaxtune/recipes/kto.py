"""KTO: completions that are each said to be good or bad, against the policy at step 0.

The reference point z₀ is one number for the whole global batch: it is estimated before the step
from prompts with completions of other prompts, under the parameters that the step starts with, and
stands in the batch as `POINT`. So it does not depend on micro-batches or devices. Held-out data
have one z₀ a source, whatever the batch size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.core.tree import Tree, combine
from jaxtune.core.weighted import Weighted, weighted
from jaxtune.data.batches import Batch, eval_batches
from jaxtune.data.mismatched import mismatched
from jaxtune.data.stream import Stream
from jaxtune.models import decoder
from jaxtune.objectives import completions as of
from jaxtune.objectives.kto import kto_loss
from jaxtune.objectives.sft import router_balance
from jaxtune.parallel.batches import global_batch, held_rows
from jaxtune.parallel.rules import batch_sharding, replicated
from jaxtune.peft.method import Method
from jaxtune.recipes import stream_feed
from jaxtune.recipes.assemble import Parts
from jaxtune.recipes.base import Base
from jaxtune.recipes.data import Data
from jaxtune.recipes.evaluation import held_out
from jaxtune.recipes.objective import Objective, targets_alone, token_rows, tokenised
from jaxtune.recipes.preference import Reference, reference_of
from jaxtune.recipes.rows import Rows
from jaxtune.recipes.scores import chunk_bytes, predictions
from jaxtune.training.feed import Source
from jaxtune.training.state import TrainState
from jaxtune.training.step import Loss, Metrics, SumLoss

POINT = "reference_point"


def log_ratios(
    parts: Parts, reference: Reference, rows: Rows
) -> Callable[[Tree, Tree, Batch, jax.Array | None], Any]:
    """Returns a function that gives log π − log π_ref of a batch's completions.

    It takes (trainable, frozen, batch, dropout key) and returns (float32 [B, C], their target-side
    batch, log π − log π_ref of each token [B, T], load-balancing loss or None).
    """
    config = parts.config

    def run(trainable: Tree, frozen: Tree, batch: Batch, key: jax.Array | None):
        params = combine(trainable, decoder.with_gathered_head(config, frozen))
        found = predictions(
            config,
            parts.method,
            params,
            batch,
            key,
            shards=rows.shards,
            logits_bytes=chunk_bytes(config, trainable, rows.shards),
            most=rows.targets,
        )
        fixed = jax.lax.stop_gradient(reference(params, batch, found))
        moved = found.scores.logprobs - fixed
        completions = found.batch["completions"]
        count = rows.most_completions(2, completions.shape[1])  # with a token before the first
        return of.totals(moved, completions, count), found.batch, moved, found.balance

    return run


def loss_of(config: Any, parts: Parts, rows: Rows, balance: float) -> SumLoss:
    """Returns the summed KTO loss of a batch; see `training.step.SumLoss`."""
    objective = config.objective
    ratios_of = log_ratios(parts, reference_of(config, parts, rows), rows)

    def sum_loss(
        trainable: Tree, frozen: Tree, batch: Batch, key: jax.Array | None
    ) -> tuple[Loss, Metrics]:
        ratios, batch, moved, uneven = ratios_of(trainable, frozen, batch, key)
        completions, count = batch["completions"], ratios.shape[1]

        def each(name: str) -> jax.Array:
            return of.of_completion(batch[name], completions, count)

        weights = each("example_weight") * of.present(completions, count)
        good = each("label")
        loss, metrics = kto_loss(
            ratios,
            good,
            weights,
            each(POINT),
            beta=objective.beta,
            desirable_weight=objective.desirable_weight,
            undesirable_weight=objective.undesirable_weight,
        )
        metrics["accuracy"] = weighted(jnp.where(good > 0, ratios > 0, ratios < 0), weights)
        metrics["drift"] = weighted(jnp.abs(moved), completions > 0)
        if uneven is None:
            return loss, metrics
        term = router_balance(uneven, batch["loss_mask"])
        metrics["router_balance"] = term
        if not balance:
            return loss, metrics
        return {"preference": loss, "balance": Weighted(balance * term.sum, term.weight)}, metrics

    return sum_loss


def open_data(config: Any, base: Base, method: Method) -> Data:
    """Returns the examples, and beside them prompts with completions of others in their order."""
    data, num_virtual = tokenised(config, base, method), method.num_virtual
    stream, room = data.stream, config.data.seq_len - num_virtual
    stores = [mismatched(store, room, f"data.train[{i}]") for i, store in enumerate(stream.stores)]
    evals = {
        name: mismatched(store, room, f"data.eval[{i}]")
        for i, (name, store) in enumerate(data.evals.items())
    }
    others = Stream(
        stores,
        stream.weights,
        seq_len=stream.seq_len,
        shuffle=stream.shuffle,
        seed=stream.seed,
        num_virtual=num_virtual,
    )
    return dataclasses.replace(
        data, mismatched=dataclasses.replace(data, stream=others, evals=evals)
    )


def estimator(plan: Any) -> Callable[[Tree, Tree, dict[str, jax.Array]], Weighted]:
    """Returns the jitted (trainable, frozen, mismatched batch) → Σ log π − log π_ref, and count."""
    reference = reference_of(plan.config, plan.parts, plan.rows)
    ratios_of = log_ratios(plan.parts, reference, plan.rows)

    def run(trainable: Tree, frozen: Tree, batch: dict[str, jax.Array]) -> Weighted:
        ratios, batch, *_ = ratios_of(trainable, frozen, batch, None)
        return weighted(ratios, of.present(batch["completions"], ratios.shape[1]))

    return jax.jit(
        run,
        in_shardings=(plan.layout.state.trainable, plan.layout.frozen, batch_sharding(plan.mesh)),
        out_shardings=replicated(plan.mesh),
    )


def point_of(sums: Iterable[Weighted]) -> float:
    """Returns z₀ = max(0, mean); see `objectives.kto.reference_point`."""
    total, count = np.sum([jax.device_get(one) for one in sums], axis=0)
    return max(float(total) / float(count), 0.0) if count else 0.0


def with_point(batch: Batch, point: float) -> Batch:
    """Returns the batch with the reference point on every token."""
    return batch | {POINT: np.full_like(batch["loss_mask"], point)}


def open_feed(plan: Any, begun: Any, note: Callable[[dict[str, Any]], None]) -> Source:
    """Returns the Source that estimates z₀ of each batch from the state that the step starts with.

    The step waits for the number: a forward pass of policy and reference a step.
    """
    source = stream_feed.open_feed(plan, begun, note)
    others = stream_feed.batches_of(plan, plan.data.mismatched.stream, int(begun.state.step))
    rows = held_rows(plan.config.batch_size, plan.config.data.seq_len, plan.mesh)
    estimate = estimator(plan)

    def feed(state: TrainState) -> tuple[Batch, dict[str, float]]:
        batch, told = source.feed(state)
        placed = global_batch(next(others), plan.mesh, rows)
        return with_point(batch, point_of([estimate(state.trainable, begun.frozen, placed)])), told

    return Source(feed, source.arrays)


def evaluate(plan: Any, trainable: Tree, frozen: Tree) -> dict[str, float]:
    """Returns the `eval/…` metrics; z₀ is that of the whole source (CORRECTNESS C3)."""
    size, length = plan.config.eval.batch_size, plan.config.data.seq_len
    rows = held_rows(size, length, plan.mesh)
    here = slice(None) if rows is None else rows.held
    virtual, estimate = plan.parts.method.num_virtual, estimator(plan)
    results = {}
    for name, store in plan.data.evals.items():
        others = eval_batches(plan.data.mismatched.evals[name], size, length, virtual, here)
        point = point_of(
            estimate(trainable, frozen, global_batch(batch, plan.mesh, rows)) for batch in others
        )
        batches = (with_point(b, point) for b in eval_batches(store, size, length, virtual, here))
        results[name] = held_out.sums(plan, batches, trainable, frozen, rows)
    return held_out.named(results)


def padding(config: Any, data: Data, rows: int, num_virtual: int) -> Batch:
    """Returns a batch of padding with the reference point."""
    return with_point(token_rows(config, data, rows, num_virtual), 0.0)


OBJECTIVE = Objective(
    trained=lambda config, parts, rows: loss_of(config, parts, rows, config.objective.balance),
    held_out=lambda config, parts, rows: loss_of(config, parts, rows, 0.0),
    term="preference",
    likelihood=False,
    open_data=open_data,
    open_feed=open_feed,
    evaluate=evaluate,
    padding=padding,
    at_start=lambda _: None,  # λ_D / 2 and λ_U / 2 in the proportion of the data
    head_tokens=targets_alone,
)
