"""Event loops that finish what they have begun."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager


class Finishing(asyncio.SelectorEventLoop):
    """A loop that waits for the tasks under way before it closes; their errors are dropped.

    Orbax reads and writes many arrays at once and, at the first that fails, closes the loop.
    TensorStore's threads would then hand the others to a closed loop, and print a traceback for
    each.
    """

    def close(self) -> None:
        """Waits for what is under way, then closes the loop."""
        left = asyncio.all_tasks(self)
        if left and not self.is_running():
            self.run_until_complete(asyncio.gather(*left, return_exceptions=True))
        super().close()


class Policy(asyncio.DefaultEventLoopPolicy):
    """Makes such loops."""

    def new_event_loop(self) -> asyncio.AbstractEventLoop:
        """Returns a loop that finishes what it has begun."""
        return Finishing()


@contextmanager
def finishing() -> Iterator[None]:
    """Loops made in this block, by any thread, finish what they have begun."""
    before = asyncio.get_event_loop_policy()
    asyncio.set_event_loop_policy(Policy())
    try:
        yield
    finally:
        asyncio.set_event_loop_policy(before)
