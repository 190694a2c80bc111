"""The tests that the completion's program passes."""

from __future__ import annotations

import os
import re
from concurrent.futures import ThreadPoolExecutor

from jaxtune.core.errors import RequestError
from jaxtune.rl.rewards import arguments, sandbox
from jaxtune.rl.rewards.reward import Scorer

_BLOCK = re.compile(r"^[ \t]*```[ \t]*(?:python3?|py)?[ \t]*\n(.*?)^[ \t]*```", re.M | re.S | re.I)


def code(
    column: str = "tests",
    score: str = "all",
    seconds: float = 10.0,
    memory: int = 512,
    isolation: str = "full",
    workers: int | None = None,
) -> Scorer:
    """Runs the completion's last fenced block of Python on the record's tests.

    A completion without a fence is run as a whole. Every sample has a process of its own, in which
    the tests run one after the other in the program's namespace.

    Args:
        column: field of the records: Python source that raises where the program is wrong, or a
            list of such; None: no score.
        score: "all": 1.0 if every test passes, else 0.0; "share": the share that passes.
        seconds: wall and processor time of one sample.
        memory: MiB of address space of one sample.
        isolation: see `sandbox.run`.
        workers: processes at once; by default the processors, at most 8.

    Raises:
        RequestError: this machine cannot isolate a program as asked.
    """
    arguments.text("column", column)
    arguments.choice("score", score, ("all", "share"))
    arguments.number("seconds", seconds, 0.1)
    arguments.whole("memory", memory, 64)
    arguments.choice("isolation", isolation, sandbox.ISOLATION)
    if workers is not None:
        arguments.whole("workers", workers, 1)
    limits = sandbox.Limits(seconds=float(seconds), memory=memory)
    try:
        sandbox.run("", [], limits, isolation)
    except sandbox.NoSandbox as error:
        raise RequestError(
            f"{isolation!r} is not to be had on this machine ({error}); 'syscalls' needs seccomp, "
            "'full' Landlock besides; with 'none' completions run as the user, with limits only",
            key="isolation",
        ) from None

    def judge(completion: str, tests: str | list[str] | None) -> float | None:
        tests = [tests] if isinstance(tests, str) else list(tests or ())
        if not tests:
            return None
        outcome = sandbox.run(program(completion), tests, limits, isolation)
        failed = sum(why is not None for why in outcome.failures)
        return float(failed == 0) if score == "all" else 1.0 - failed / len(tests)

    def run(prompts: list, completions: list, **columns: list) -> list[float | None]:
        with ThreadPoolExecutor(workers or min(8, os.cpu_count() or 1)) as pool:
            return list(pool.map(judge, completions, columns[column]))

    return Scorer(run, (column,))


def program(completion: str) -> str:
    """Returns the last fenced block of Python, or the whole text where there is none.

    >>> program("So:" + chr(10) + "```python" + chr(10) + "x = 1" + chr(10) + "```")
    'x = 1\\n'
    """
    blocks = _BLOCK.findall(completion)
    return blocks[-1] if blocks else completion
