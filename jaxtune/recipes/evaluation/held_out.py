"""The loss of a run on its held-out examples."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any

import jax

from jaxtune.core.tree import Tree
from jaxtune.data.batches import Batch, eval_batches
from jaxtune.data.parts import Part
from jaxtune.evaluate.loss import Sums, loss_sums, reported
from jaxtune.parallel.batches import Rows, held_rows


def evaluate(plan: Any, trainable: Tree, frozen: Tree) -> dict[str, float]:
    """Returns the `eval/…` metrics of each held-out source, of its parts, and of all together."""
    size, length = plan.config.eval.batch_size, plan.config.data.seq_len
    rows = held_rows(size, length, plan.mesh)
    here = slice(None) if rows is None else rows.held

    def measured(store: Any) -> Sums:
        batches = eval_batches(store, size, length, plan.parts.method.num_virtual, here)
        return sums(plan, batches, trainable, frozen, rows)

    results, parts = {}, {}
    for name, store in plan.data.evals.items():
        chosen = plan.data.parts.get(name)
        if chosen is None:
            results[name] = measured(store)
            continue
        own = {value: measured(Part(store, indices)) for value, indices in chosen.items()}
        results[name] = functools.reduce(Sums.__add__, own.values())
        parts |= {f"{name}/{value}": found for value, found in own.items()}
    return each(parts) | named(results)


def sums(
    plan: Any, batches: Iterable[Batch], trainable: Tree, frozen: Tree, rows: Rows | None
) -> Sums:
    """Returns what a plan's evaluation measures on batches; see `evaluate.loss.loss_sums`."""
    likelihood = plan.objective.likelihood
    return loss_sums(
        plan.evaluation, trainable, frozen, batches, plan.mesh, rows, likelihood=likelihood
    )


def named(results: Mapping[str, Sums]) -> dict[str, float]:
    """Returns {metric: value}: `eval/NAME/…` of each source where there are several, and
    `eval/loss` and its like over all of them.
    """
    if not results:
        return {}
    whole = functools.reduce(Sums.__add__, results.values())
    own = each(results) if len(results) > 1 else {}
    return own | {f"eval/{k}": v for k, v in whole.means().items()}


def each(results: Mapping[str, Sums]) -> dict[str, float]:
    """Returns {`eval/NAME/…`: value} of each name."""
    return {f"eval/{n}/{k}": v for n, r in results.items() for k, v in r.means().items()}


def names(plan: Any) -> set[str]:
    """Returns the names of the metrics that `evaluate` gives; none without held-out data."""
    if not plan.data.evals:
        return set()
    state, frozen, _ = plan.abstract_arguments()
    _, own = jax.eval_shape(plan.evaluation, state.trainable, frozen, plan.abstract_rows())
    sources = [f"{name}/" for name in plan.data.evals] if len(plan.data.evals) > 1 else []
    sources += [f"{name}/{value}/" for name, values in plan.data.parts.items() for value in values]
    likely = ("perplexity",) if plan.objective.likelihood else ()
    measured = ("loss", *likely, "tokens", *reported(own))
    return {f"eval/{source}{name}" for source in ("", *sources) for name in measured}
