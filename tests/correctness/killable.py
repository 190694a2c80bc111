"""Runs `jaxtune` again and again in processes forked from one that has done all the imports.

    python -m tests.correctness.killable

Reads a JSON object a line: {"arguments": [...], "kill": null | {"after": s} | {"step": n, "wait":
s}}, and answers each with the status of the process. `kill` sends it SIGKILL so many seconds after
its start, or after it logged a step of its own.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import threading
import time
from typing import Any


def child(arguments: list[str], kill: dict[str, Any] | None) -> int:
    """Runs the command; dies in it if asked to."""
    from jaxtune.cli.main import main
    from jaxtune.training.workdir import MetricsFile

    if kill is not None and "step" in kill:
        append = MetricsFile.append

        def armed(self: MetricsFile, row: dict[str, Any]) -> None:
            append(self, row)
            if row["step"] == kill["step"]:
                threading.Timer(kill["wait"], os.kill, (os.getpid(), signal.SIGKILL)).start()

        MetricsFile.append = armed
    return main(arguments)


def serve() -> None:
    """Answers requests until the input ends."""
    for name in ("cli.train", "recipes.train", "cli.config_file"):
        importlib.import_module(f"jaxtune.{name}")
    for package in ("grain", "tensorboardX"):
        importlib.import_module(package)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the runs print goes to the log
    for line in sys.stdin:
        request = json.loads(line)
        process = os.fork()
        if process == 0:
            code = child(request["arguments"], request["kill"])
            sys.stdout.flush()
            os._exit(code)
        if "after" in (request["kill"] or {}):
            time.sleep(request["kill"]["after"])
            os.kill(process, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        print(status, file=answers, flush=True)


if __name__ == "__main__":
    serve()
