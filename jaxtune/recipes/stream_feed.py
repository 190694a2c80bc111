"""Batches that depend on the step alone: rows of the tokenised data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jaxtune.data.batches import Batches
from jaxtune.data.stream import Stream
from jaxtune.parallel.batches import held_rows
from jaxtune.training.feed import Source


def open_feed(plan: Any, begun: Any, note: Callable[[dict[str, Any]], None]) -> Source:
    """Returns the Source of a run that reads its data in order; see `objective.Objective`."""
    batches = batches_of(plan, plan.data.stream, int(begun.state.step))
    return Source(lambda state: (next(batches), {}))


def batches_of(plan: Any, stream: Stream, start: int) -> Batches:
    """Returns the run's batches of a stream from a step on, the rows that this process holds."""
    size, budget = plan.config.batch_size, plan.data.budget
    rows = held_rows(size, plan.config.data.seq_len, plan.mesh)
    return stream.batches(
        size,
        budget.steps,
        start=start,
        rows=slice(None) if rows is None else rows.held,
        row_limit=budget.rows,
    )
