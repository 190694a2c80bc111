"""A small process beside each process of a run: it outlives it, and tells the others how it ended.

    python -m jaxtune.parallel.witness HOST PORT COUNT INDEX LIMIT

JAX's own service ends a process without a word when process 0 is gone, so what must still be done
then (saying who is missing, in `summary.json`) is done here. Only the standard library is loaded.

`parallel.hub` tells what they say to each other.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import threading
import time
from typing import Any

from jaxtune.parallel.hub import Hub, Lines, listen

GRACE = 10.0  # seconds that a process has to end by itself once it is told that another is lost


class Witness:
    """What stands beside one process.

    Args:
        lines: to the hub.
        index, count: which process of how many.
        address: HOST of the hub, for messages.
        limit: seconds of silence that are an end.
    """

    def __init__(self, lines: Lines, index: int, count: int, address: str, limit: float):
        self.lines, self.index, self.count = lines, index, count
        self.address, self.limit = address, limit
        self.parent = os.getppid()
        self.summary: str | None = None
        self.parting = False

    def run(self) -> None:
        """Passes lines on in both directions until there is nothing more to say."""
        self.lines.send({"hello": self.index, "host": socket.gethostname()})
        for target in (self.beat, self.listen_to_the_process):
            threading.Thread(target=target, daemon=True).start()
        for message in self.lines.receive():
            if "lost" in message:
                self.end(message)
                return
            self.pass_on(message)
            if "missing" in message:
                return
        if not self.parting:
            self.end(
                {
                    "lost": 0,
                    "reason": f"process 0 of {self.count} (host {self.address}) does not answer",
                    "writer": 1,
                    "code": 1,
                }
            )

    def beat(self) -> None:
        """Shows the hub that this process is there, and that the hub is."""
        while True:
            time.sleep(self.limit / 5)
            self.lines.send({})

    def listen_to_the_process(self) -> None:
        """Passes on what the process says, and that it ended if it does not say so itself."""
        for line in sys.stdin.buffer:
            message = json.loads(line)
            if "summary" in message and "failed" not in message:
                self.summary = message["summary"]
                continue
            self.parting |= "bye" in message or "failed" in message
            self.lines.send(message)
        if not self.parting:
            self.lines.send({"died": "was killed"})
        elif "bye" in message:
            self.lines.link.shutdown(socket.SHUT_RDWR)  # ends `run`

    def pass_on(self, message: dict[str, Any]) -> None:
        """Tells the process; one that has ended is not told."""
        with contextlib.suppress(OSError):
            sys.stdout.buffer.write(json.dumps(message).encode() + b"\n")
            sys.stdout.buffer.flush()

    def end(self, message: dict[str, Any]) -> None:
        """Writes why the run ended, if it is for this one to do; then tells the process."""
        if message["writer"] == self.index and self.summary is not None:
            note = {"stop_reason": "error", "error": message["reason"]}
            with contextlib.suppress(Exception):  # the process says it on stderr in any case
                write(self.summary, json.dumps(note, indent=2) + "\n")
        self.pass_on(message)
        until = time.monotonic() + GRACE
        while os.getppid() == self.parent and time.monotonic() < until:
            time.sleep(0.05)
        if os.getppid() == self.parent:
            os.kill(self.parent, signal.SIGKILL)


def write(path: str, text: str) -> None:
    """Writes a file, whole or not at all."""
    if "://" in path:
        from etils import epath

        epath.Path(path).write_text(text)
        return
    aside = f"{path}.{os.getpid()}.tmp"
    with open(aside, "w", encoding="utf-8") as file:
        file.write(text)
    os.replace(aside, path)


def connect(host: str, port: int, limit: float) -> socket.socket | None:
    """Returns a connection to the hub, tried again until the limit; None if there is none."""
    until = time.monotonic() + limit
    while time.monotonic() < until:
        try:
            return socket.create_connection((host, port), timeout=limit)
        except OSError:
            time.sleep(0.1)
    return None


def main(host: str, port: int, count: int, index: int, limit: float) -> None:
    """Stands beside process `index` until the run is over."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(
            number, signal.SIG_IGN
        )  # the process itself is asked to stop, not its witness
    hub = None
    where = host
    if index == 0:
        try:
            hub = threading.Thread(target=Hub(listen(port), count, limit).run)
        except OSError as error:
            print(json.dumps({"missing": f"port {port} cannot be taken: {error.strerror}"}))
            return
        hub.start()
        where = "localhost"
    link = connect(where, port, limit)
    if link is None:
        reason = f"process 0 of {count} (host {host}) does not answer on port {port}"
        print(json.dumps({"missing": f"{reason} within {limit:g} s"}), flush=True)
        return
    Witness(Lines(link, 2 * limit), index, count, host, limit).run()
    with contextlib.suppress(OSError):
        link.shutdown(socket.SHUT_RDWR)  # else the hub would wait for its own host's witness
    if hub is not None:
        hub.join()


if __name__ == "__main__":
    host_, port_, count_, index_, limit_ = sys.argv[1:]
    main(host_, int(port_), int(count_), int(index_), float(limit_))
    sys.stdout.flush()
    os._exit(0)  # threads that wait for the other side are of no use any more
