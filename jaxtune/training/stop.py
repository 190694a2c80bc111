"""Why a run stops."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from jaxtune.parallel import processes

FINISHED, PREEMPTED, NON_FINITE, ERROR = "finished", "preempted", "non_finite", "error"
BUDGET, RETENTION = "budget", "retention"


class StopRequest:
    """Set once somebody asks the run to save and stop; of several processes, any one.

    `signal` says who: a signal's name, or BUDGET once the run's time is spent.
    """

    def __init__(self) -> None:
        self.signal: str | None = None
        self.told = False

    def reached(self, step: int) -> str | None:
        """Returns why the run is to stop after this step, or None; all processes say the same.

        Args:
            step: steps done.
        """
        if not processes.joined():
            return None if self.signal is None else f"{self.signal} at step {step}"
        if self.signal is not None and not self.told:
            self.told = True
            processes.ask_to_stop(self.signal)
        agreed = processes.stop_step(step)
        if agreed is None:
            return None
        return f"{agreed['signal']} to process {agreed['by']} at step {step}"


def reason_of(asked: str) -> str:
    """Returns the stop reason of a request, from what begins its description."""
    return BUDGET if asked.startswith(BUDGET) else PREEMPTED


@contextmanager
def on_sigterm() -> Iterator[StopRequest]:
    """Yields a StopRequest that SIGTERM sets: a preempted VM's notice, or a scheduler's.

    Outside the main thread Python cannot take signals, so there the request stays unset.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def take(number: int, _: object) -> None:
        request.signal = signal.Signals(number).name

    before = signal.signal(signal.SIGTERM, take)
    try:
        yield request
    finally:
        signal.signal(signal.SIGTERM, before)
