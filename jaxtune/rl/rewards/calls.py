"""A call that can be given up."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from typing import Any

# Threads that hang in foreign code hold memory: no more of one reward's are begun.
MOST_GIVEN_UP = 8


class Hung(Exception):
    """A call did not return in time and was given up."""


def call(function: Callable[[], Any], timeout: float | None, name: str) -> Any:
    """Returns what the function returns, or raises what it raises, within a time limit.

    The function runs in a daemon thread, which keeps neither the caller nor the end of the
    program waiting. A thread that is given up is asked to end at its next Python instruction, so
    that an endless loop does not go on taking processor time; one that hangs in foreign code, or
    in a system call, stays until that returns.

    Args:
        function: without arguments.
        timeout: seconds; None: no limit, and no thread.
        name: of the thread.

    Raises:
        Hung: the time is over, or MOST_GIVEN_UP earlier calls of this name still hang.
    """
    if timeout is None:
        return function()
    label = f"reward {name}"
    if sum(thread.name == label for thread in threading.enumerate()) >= MOST_GIVEN_UP:
        raise Hung(f"was not called: {MOST_GIVEN_UP} calls that were given up still hang")
    outcome: list[tuple[bool, Any]] = []

    def run() -> None:
        try:
            outcome.append((True, function()))
        except BaseException as error:
            outcome.append((False, error))

    thread = threading.Thread(target=run, name=label, daemon=True)
    thread.start()
    thread.join(timeout)
    if not outcome:
        ctypes.pythonapi.PyThreadState_SetAsyncExc(
            ctypes.c_ulong(thread.ident), ctypes.py_object(SystemExit)
        )
        raise Hung(f"did not return within {timeout:g} s")
    done, value = outcome[0]
    if done:
        return value
    raise value
