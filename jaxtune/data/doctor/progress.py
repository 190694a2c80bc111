"""How far the doctor is: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_SECONDS_BETWEEN_LINES = 10.0
Advance = Callable[[int], None]


@contextlib.contextmanager
def advancing(console: Console | None, what: str, total: int) -> Iterator[Advance]:
    """Yields a function that is told how many more are done; a console of None shows nothing."""
    if console is None:
        yield lambda _: None
    elif console.is_terminal:
        columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task(what, total=total)
            yield lambda count: bar.advance(task, count)
    else:
        done, printed = 0, time.monotonic()

        def advance(count: int) -> None:
            nonlocal done, printed
            done += count
            if time.monotonic() - printed >= _SECONDS_BETWEEN_LINES:
                printed = time.monotonic()
                console.print(f"{what}: {done:,} of {total:,}", highlight=False)

        yield advance
