"""Batches that depend on the step alone: rows of the tokenised data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jaxtune.parallel.batches import held_rows
from jaxtune.training.feed import Source


def open_feed(plan: Any, begun: Any, note: Callable[[dict[str, Any]], None]) -> Source:
    """Returns the Source of a run that reads its data in order; see `objective.Objective`."""
    size, budget = plan.config.batch_size, plan.data.budget
    rows = held_rows(size, plan.config.data.seq_len, plan.mesh)
    batches = plan.data.stream.batches(
        size,
        budget.steps,
        start=int(begun.state.step),
        rows=slice(None) if rows is None else rows.held,
        row_limit=budget.rows,
    )
    return Source(lambda state: (next(batches), {}))
