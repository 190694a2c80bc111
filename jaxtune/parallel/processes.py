"""Several processes of one run: start-up, waiting for each other, stopping together.

One process runs on each host of a TPU slice (or for each GPU of a cluster). JAX joins their devices
to one machine; a witness beside each process (`parallel.witness`) knows who is there.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np

from jaxtune.core.errors import RequestError
from jaxtune.parallel.cluster import FLAG, Place, find, parse, time_limit

# After an error of its own a process waits so long for the news that another one is the cause.
NEWS = 3.0
LOST = 1  # exit code


@dataclass
class Group:
    """The other processes, as this one hears of them.

    Attributes:
        place: which process this is.
        witness: the process beside it.
        hosts: name of each process's host.
    """

    place: Place
    witness: subprocess.Popen
    hosts: list[str] = field(default_factory=list)
    missing: str | None = None
    news: threading.Condition = field(default_factory=threading.Condition)
    gathered: dict[str, list[Any]] = field(default_factory=dict)
    names: Iterator[int] = field(default_factory=itertools.count)
    lost: dict[str, Any] | None = None
    asked: bool = False
    stop: dict[str, Any] | None = None
    step: int = -1
    parted: bool = False
    speaking: threading.Lock = field(default_factory=threading.Lock)

    def send(self, message: dict[str, Any]) -> None:
        """Says something to the witness."""
        with self.speaking, contextlib.suppress(OSError):
            self.witness.stdin.write(json.dumps(message).encode() + b"\n")
            self.witness.stdin.flush()

    def listen(self) -> None:
        """Takes what the witness says, in a thread of its own."""
        for line in self.witness.stdout:
            message = json.loads(line)
            with self.news:
                self.take(message)
                self.news.notify_all()
            if "lost" in message:
                leave(message)
        with self.news:
            self.missing = self.missing or "the witness of this process has ended"
            self.news.notify_all()
        if self.hosts and not self.parted:
            leave({"reason": self.missing, "code": LOST})

    def take(self, message: dict[str, Any]) -> None:
        """Notes what the hub says."""
        if "all" in message:
            self.hosts = message["all"]
        elif "missing" in message:
            self.missing = message["missing"]
        elif "gathered" in message:
            self.gathered[message["gathered"]] = message["values"]
        elif "ask" in message:
            self.asked = True
            self.send({"at": self.step})
        elif "stop_at" in message:
            self.stop = message
        elif "lost" in message:
            self.lost = message

    def wait(self, ready: Any) -> None:
        """Returns when `ready()` is true, or when the witness has ended."""
        with self.news:
            self.news.wait_for(lambda: ready() or self.missing is not None)


# A process belongs to one group for its whole life, as to one jax.distributed.
_groups: list[Group] = []


def join(text: str = "auto") -> None:
    """Makes this process one of the run's; must come before JAX touches a device.

    Args:
        text: "auto", "none" or "HOST:PORT,COUNT,INDEX".

    Raises:
        RequestError: the text means nothing, or a process did not come within the time limit.
    """
    place, limit = parse(text), time_limit()
    if _groups or place == "none" or (place == "auto" and jax.distributed.is_initialized()):
        return
    if place == "auto":
        place = find(limit)
    if place is None or place.count == 1:
        return
    group = meet(place, limit)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # SIGTERM is ours to handle: see `stop_step`.
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(
        f"{place.host}:{place.port}",
        place.count,
        place.index,
        local_device_ids=place.devices,
        cluster_detection_method="deactivate",
        initialization_timeout=max(int(limit), 30),
        # The witnesses know first; JAX's own clock ends a process without a word.
        heartbeat_timeout_seconds=max(int(3 * limit), 100),
        shutdown_timeout_seconds=max(int(limit), 30),
    )
    _groups.append(group)


def meet(place: Place, limit: float) -> Group:
    """Returns the group once all its processes are there.

    Raises:
        RequestError: one is missing after `limit` seconds, by name.
    """
    words = [place.host.strip("[]"), str(place.port), str(place.count), str(place.index)]
    witness = subprocess.Popen(
        [sys.executable, "-m", "jaxtune.parallel.witness", *words, str(limit)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # what ends the process must not end its witness
        env=os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    )
    group = Group(place, witness)
    threading.Thread(target=group.listen, daemon=True, name="witness").start()
    group.wait(lambda: group.hosts)
    if not group.hosts:
        raise RequestError(str(group.missing), key=FLAG)
    return group


def leave(lost: dict[str, Any]) -> NoReturn:
    """Ends this process because another is lost: what it waits for may never come."""
    if lost["code"] != LOST:
        time.sleep(NEWS)  # a request that all refuse: each says so itself
    print(f"jaxtune: the run stops: {lost['reason']}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(lost["code"])


def joined() -> bool:
    """Tells whether this process is one of several that `join` brought together."""
    return bool(_groups)


def is_writer() -> bool:
    """Tells whether this process writes the files that a run has once."""
    return (_groups[0].place.index if _groups else jax.process_index()) == 0


def gather(name: str, value: Any, limit: float | None = None) -> list[Any]:
    """Returns what each process gives, in their order; [value] for one process alone.

    Args:
        name: of the place in the program, the same in all processes.
        value: JSON.
        limit: seconds after which the run ends, naming who has not come; None waits for as long
            as the others live.
    """
    if jax.process_count() == 1:
        return [value]
    if not _groups:
        raise RequestError(
            f"{jax.process_count()} processes were joined by jax.distributed alone; call "
            "jaxtune.parallel.processes.join in its place",
            key=FLAG,
        )
    group = _groups[0]
    key = f"{name} #{next(group.names)}"
    group.send({"gather": key, "value": value, "limit": limit})
    group.wait(lambda: key in group.gathered)
    if key not in group.gathered:
        raise RuntimeError(f"{name}: {group.missing}")
    return group.gathered.pop(key)


def gather_arrays(array: np.ndarray) -> list[np.ndarray]:
    """Returns the array of each process, in their order; first axes may differ in length."""
    if jax.process_count() == 1:
        return [array]
    from jax.experimental import multihost_utils

    lengths = gather("lengths of arrays", len(array))
    padded = np.zeros((max(lengths), *array.shape[1:]), array.dtype)
    padded[: len(array)] = array
    everyone = np.asarray(multihost_utils.process_allgather(padded))
    return [part[:length] for part, length in zip(everyone, lengths, strict=True)]


def wait_for_all(name: str) -> None:
    """Returns when every process of the run has come to this place, which must be soon.

    Args:
        name: of the place, the same in all processes.
    """
    gather(name, None, time_limit())


def all_agree(name: str, error: RequestError | None) -> None:
    """Raises the first process's error in all of them, so that none waits for one that refuses."""
    told = None if error is None else [error.message, error.key, error.where]
    first = next(filter(None, gather(name, told)), None)
    if first is not None:
        raise RequestError(first[0], key=first[1], where=first[2]) from error


def summary_path(path: Path) -> None:
    """Says where the reason is written if a process is lost from now on."""
    for group in _groups:
        text = str(path)
        group.send({"summary": text if "://" in text else os.path.abspath(text)})


def ask_to_stop(signal: str) -> None:
    """Asks all processes to stop at the same step."""
    for group in _groups:
        group.send({"stop": signal})


def stop_step(step: int) -> dict[str, Any] | None:
    """Returns {"signal", "by"} if all have agreed to stop at this step or before, else None.

    Between a request to stop and the agreement, which takes the time of a message, no process
    goes on to another step, so that the one that is agreed on is still to come for all.

    Args:
        step: steps done.
    """
    if not _groups:
        return None
    group = _groups[0]
    group.wait(lambda: not group.asked or group.stop is not None)
    with group.news:
        group.step = step
        agreed = group.stop
    return agreed if agreed is not None and step >= agreed["stop_at"] else None


def wait_for_news() -> None:
    """Gives the witness time to say that an error here is another process's end."""
    if _groups:
        time.sleep(NEWS)


def part(error: BaseException | None, code: int) -> None:
    """Says that this process is done, or why it failed; process 0 has written its reason itself.

    Args:
        error: None at a good end.
        code: of the exit, for the others too.
    """
    for group in _groups:
        group.parted = True
        if error is None:
            group.send({"bye": True})
            continue
        refused = isinstance(error, RequestError)
        reason = str(error) if refused else f"{type(error).__name__}: {error}"
        silent = not refused and group.place.index > 0
        group.send({"failed": reason, "summary": silent, "code": code})
