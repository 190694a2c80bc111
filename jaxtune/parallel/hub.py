"""What the witnesses of a run's processes are connected to; the standard library alone.

Lines of JSON come and go: from the process to its witness on stdin, back on stdout, and between
each witness and the hub, a thread of witness 0, on HOST:PORT. The hub lets go of the port, which
JAX's service takes next, but keeps the connections.

From a process: {"gather": name, "value": v, "limit": seconds or null}, {"stop": signal}, {"at":
step}, {"failed": reason, "summary": bool, "code": n}, {"bye": true}, {"summary": path}.
From the hub: {"all": [host names]}, {"missing": reason}, {"gathered": name, "values": [...]},
{"ask": true}, {"stop_at": step, "signal": name, "by": process}, {"lost": process, "reason": text,
"writer": process or null, "code": n}.
"""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any


class Lines:
    """A socket as lines of JSON; silence for `limit` seconds counts as its end."""

    def __init__(self, link: socket.socket, limit: float):
        link.settimeout(limit)
        link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.link, self.lock = link, threading.Lock()

    def send(self, message: dict[str, Any]) -> None:
        """Sends a message; a broken connection is noticed by `receive`."""
        with self.lock, contextlib.suppress(OSError):
            self.link.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> Iterator[dict[str, Any]]:
        """Yields messages until the connection ends or is silent for too long."""
        rest = b""
        while True:
            try:
                part = self.link.recv(1 << 16)
            except OSError:  # TimeoutError is one
                return
            if not part:
                return
            *whole, rest = (rest + part).split(b"\n")
            for line in whole:
                message = json.loads(line)
                if message:  # an empty one is a sign of life
                    yield message


class Hub:
    """What all witnesses are connected to.

    Args:
        listener: where they connect.
        count: processes of the run.
        limit: seconds within which all must come, and after which silence is an end.
    """

    def __init__(self, listener: socket.socket, count: int, limit: float):
        self.listener, self.count, self.limit = listener, count, limit
        self.lock = threading.RLock()
        self.links: dict[int, Lines] = {}
        self.hosts: dict[int, str] = {}
        self.gathering: dict[str, dict[int, Any]] = {}
        self.steps: dict[int, int] = {}
        self.stopping: dict[str, Any] | None = None
        self.gone: set[int] = set()
        self.over = threading.Event()

    def run(self) -> None:
        """Waits for all, then passes on what they say until the last one has gone."""
        until = time.monotonic() + self.limit
        self.listener.settimeout(0.2)
        while len(self.links) < self.count and time.monotonic() < until:
            with contextlib.suppress(OSError):  # TimeoutError is one
                link, _ = self.listener.accept()
                threading.Thread(target=self.greet, args=(link,), daemon=True).start()
        self.listener.close()
        with self.lock:
            absent = [i for i in range(self.count) if i not in self.links]
            if absent:
                names = " and ".join(f"process {i}" for i in absent)
                reason = (
                    f"{names} of {self.count} did not start within {self.limit:g} s; "
                    f"here are {', '.join(self.title(i) for i in sorted(self.links))}"
                )
                self.tell({"missing": reason})
                self.over.set()
            else:
                self.tell({"all": [self.hosts[i] for i in range(self.count)]})
        while not self.over.wait(self.limit / 5):
            self.tell({})

    def greet(self, link: socket.socket) -> None:
        """Learns who has connected, and listens to it."""
        lines = Lines(link, self.limit)
        messages = lines.receive()
        hello = next(messages, None)
        if hello is None or "hello" not in hello:
            link.close()
            return
        index = hello["hello"]
        with self.lock:
            if index in self.links or not 0 <= index < self.count:
                lines.send(
                    {
                        "missing": f"there are two processes {index} of {self.count}, on "
                        f"{self.hosts.get(index)} and {hello['host']}"
                    }
                )
                link.close()
                return
            self.hosts[index] = hello["host"]
            self.links[index] = lines
        for message in messages:
            with self.lock:
                self.take(index, message)
        with self.lock:
            if index not in self.gone:
                self.lose(index, "does not answer any more")
            if len(self.gone) == self.count:
                self.over.set()

    def title(self, index: int) -> str:
        """Returns what a person calls a process."""
        return f"process {index} of {self.count} (host {self.hosts.get(index, '?')})"

    def tell(self, message: dict[str, Any]) -> None:
        """Sends a message to all that are there."""
        for lines in self.links.values():
            lines.send(message)

    def take(self, index: int, message: dict[str, Any]) -> None:
        """Does what a process asks for."""
        if "gather" in message:
            self.gather(index, message)
        elif "stop" in message and self.stopping is None:
            self.stopping = {"signal": message["stop"], "by": index}
            self.tell({"ask": True})
        elif "at" in message:
            self.steps[index] = message["at"]
            if len(self.steps) == self.count:
                # Each waits behind the step that it named until this is known.
                self.tell({"stop_at": max(self.steps.values()) + 1, **self.stopping})
        elif "failed" in message:
            self.lose(index, f"failed: {message['failed']}", message)
        elif "died" in message:
            self.lose(index, message["died"])
        elif "bye" in message:
            self.gone.add(index)
            if len(self.gone) == self.count:
                self.over.set()

    def gather(self, index: int, message: dict[str, Any]) -> None:
        """Collects a value of each process; the first one starts the clock."""
        name, limit = message["gather"], message["limit"]
        values = self.gathering.setdefault(name, {})
        values[index] = message["value"]
        if len(values) == self.count:
            del self.gathering[name]
            self.tell({"gathered": name, "values": [values[i] for i in range(self.count)]})
        elif len(values) == 1 and limit is not None:
            timer = threading.Timer(limit, self.late, (name, limit))
            timer.daemon = True
            timer.start()

    def late(self, name: str, limit: float) -> None:
        """Ends the run if a gathering is not complete."""
        with self.lock:
            absent = [i for i in range(self.count) if i not in self.gathering.get(name, range(0))]
            if name in self.gathering and absent:
                self.lose(
                    absent[0], f"did not come to {name.rpartition(' #')[0]!r} within {limit:g} s"
                )

    def lose(self, index: int, how: str, failed: dict[str, Any] | None = None) -> None:
        """Tells all that a process is lost; the lowest of the others writes the summary."""
        if index in self.gone:
            return
        self.gone.add(index)
        code = 1 if failed is None else failed["code"]
        silent = failed is None or failed["summary"]
        left = [i for i in range(self.count) if i not in self.gone]
        reason = f"{self.title(index)} {how}"
        self.tell(
            {"lost": index, "reason": reason, "writer": min(left) if left and silent else None}
            | {"code": code}
        )


def listen(port: int) -> socket.socket:
    """Returns a listener on all addresses whose port can be taken by another afterwards."""
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    listener = socket.create_server(("", port), family=family, dualstack_ipv6=both, backlog=512)
    return listener
