"""Runs `jaxtune` in several processes at once, as on several hosts, each with devices of its own.

    python -m tests.correctness.hosts

The processes are forked from one that has done all the imports. It reads a JSON object a line:
{"commands": [[argument, ...], ...], "devices": of each, "log": directory, "limit": seconds,
"signals": {index: [name, n]}} and answers with their ids, then with their exit statuses. A signal
comes to a process when it places its batch n, which is in the midst of the steps of the others.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

from tests.conftest import ROOT, xla_flags


def child(arguments: list[str], request: dict[str, Any], index: int) -> int:
    """Runs one command in this process."""
    devices, told = request["devices"], request["signals"].get(str(index))
    os.environ["JAXTUNE_HOST_TIMEOUT"] = str(request["limit"])
    os.environ["XLA_FLAGS"] = xla_flags(devices)
    handle = os.open(f"{request['log']}/{index}.log", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(handle, stream)
    from jaxtune.cli.main import main
    from jaxtune.training import loop

    if told is not None:
        name, at = told
        place, seen = loop.global_batch, iter(range(at + 1))

        def armed(*args: Any) -> Any:
            if next(seen, None) == at:
                os.kill(os.getpid(), getattr(signal, name))
            return place(*args)

        loop.global_batch = armed
    return main(arguments)


def serve() -> None:
    """Answers requests until the input ends."""
    for name in (
        "cli.train",
        "cli.eval",
        "recipes.train",
        "recipes.evaluation.evaluate",
        "cli.config_file",
    ):
        importlib.import_module(f"jaxtune.{name}")
    importlib.import_module("grain")
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        request = json.loads(line)
        ids = []
        for index, arguments in enumerate(request["commands"]):
            ids.append(os.fork())
            if ids[-1] == 0:
                code = 70
                try:
                    code = child(arguments, request, index)
                except BaseException:
                    traceback.print_exc()
                finally:
                    sys.stdout.flush()
                    sys.stderr.flush()
                    os._exit(code)
        print(json.dumps(ids), file=answers, flush=True)
        codes = [os.waitstatus_to_exitcode(os.waitpid(one, 0)[1]) for one in ids]
        print(json.dumps(codes), file=answers, flush=True)


class Hosts:
    """The forking process, and what its processes said.

    Args:
        directory: for logs.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        self.number, self.ports = 0, set()
        self.server = subprocess.Popen(
            [sys.executable, "-m", "tests.correctness.hosts"],
            cwd=ROOT,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def start(
        self,
        arguments: list[str],
        count: int,
        devices: int = 1,
        *,
        absent: int | None = None,
        limit: float = 120,
        signals: dict[int, tuple[str, int]] | None = None,
    ) -> list[int]:
        """Starts the command in `count` processes, without the one that is absent; returns ids."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.ports.add(str(port))
        self.number += 1
        self.log = self.directory / str(self.number)
        self.log.mkdir()
        places = [i for i in range(count) if i != absent]
        commands = [[*arguments, f"--distributed=127.0.0.1:{port},{count},{i}"] for i in places]
        request = {"commands": commands, "devices": devices, "log": str(self.log)}
        request["limit"] = limit
        request["signals"] = {str(i): told for i, told in (signals or {}).items()}
        self.server.stdin.write(json.dumps(request) + "\n")
        self.server.stdin.flush()
        return json.loads(self.server.stdout.readline())

    def wait(self) -> list[int]:
        """Returns the exit statuses, negative where a signal ended a process."""
        return json.loads(self.server.stdout.readline())

    def run(self, arguments: list[str], count: int, devices: int = 1, **more: Any) -> list[int]:
        """Runs the command to its end in `count` processes; returns the exit statuses."""
        self.start(arguments, count, devices, **more)
        return self.wait()

    def said(self, index: int) -> str:
        """What process `index` of the last command printed."""
        return (self.log / f"{index}.log").read_text()

    def all_said(self) -> str:
        """What they all printed, the end of each."""
        logs = sorted(self.log.iterdir())
        return "\n".join(f"== {path.name}\n{path.read_text()[-3000:]}" for path in logs)

    def witnesses(self) -> list[int]:
        """Ids of the witnesses of all these processes that are still there."""
        found = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                words = path.read_bytes().decode(errors="replace").split("\0")
                if "jaxtune.parallel.witness" in words and self.ports & set(words):
                    found.append(int(path.parent.name))
        return found

    def close(self) -> None:
        """Ends the server."""
        self.server.stdin.close()
        self.server.wait()


if __name__ == "__main__":
    serve()
