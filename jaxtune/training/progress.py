"""What a person sees of a run: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

SECONDS_BETWEEN_LINES = 10.0


class ProgressDisplay:
    """Shows step, loss, tokens a second and time left.

    Args:
        console: where; None shows nothing.
        total: steps of the run.
        start: steps done before.
    """

    def __init__(self, console: Console | None, total: int, start: int):
        self.console, self.total, self.start = console, total, start
        self.began: float | None = None
        self.printed = -float("inf")
        self.bar: Progress | None = None
        if console is not None and console.is_terminal:
            self.bar = Progress(
                TextColumn("[bold]training"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[note]}"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=console,
            )
            self.task = self.bar.add_task("training", total=total, completed=start, note="")

    def __enter__(self) -> ProgressDisplay:
        if self.bar is not None:
            self.bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.bar is not None:
            self.bar.stop()

    def update(self, step: int, loss: float, rate: float) -> None:
        """Shows a step; away from a terminal, one line in ten seconds, and the last."""
        now = time.monotonic()
        note = f"loss {loss:.4f}" + (f"  {rate:,.0f} tokens/s" if rate else "")
        if self.bar is not None:
            self.bar.update(self.task, completed=step, note=note)
        elif self.console is not None and (
            now - self.printed >= SECONDS_BETWEEN_LINES or step == self.total
        ):
            self.printed = now
            if self.began is not None:
                left = (now - self.began) / max(step - self.start, 1) * (self.total - step)
                note = f"{note}  {left:.0f} s left"
            self.console.print(f"step {step}/{self.total}  {note}")
        if self.began is None:  # the time before is the compiler's
            self.began, self.start = now, step
