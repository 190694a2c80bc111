"""Runs untrusted programs in processes with limits; docs/rewards.md says what holds."""

from __future__ import annotations

import functools
import json
import math
import os
import secrets
import signal
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import dataclass
from pathlib import Path

ISOLATION = ("full", "syscalls", "none")
_MIB = 2**20
_JAIL = Path(__file__).with_name("jail.py")


class NoSandbox(Exception):
    """The machine cannot isolate a program as asked."""


@dataclass(frozen=True)
class Outcome:
    """What came of a program.

    Attributes:
        failures: for each test None, or what went wrong.
        finished: whether the process came to the end of the tests by itself.
    """

    failures: list[str | None]
    finished: bool


@dataclass(frozen=True)
class Limits:
    """What one program may use.

    Attributes:
        seconds: of wall time, from the start of its process, and of processor time.
        memory: MiB of address space.
        file_size: MiB of each file that it writes.
    """

    seconds: float = 10.0
    memory: int = 512
    file_size: int = 16


def run(program: str, tests: list[str], limits: Limits, isolation: str) -> Outcome:
    """Runs a program, then each test in its namespace.

    Args:
        program: Python source.
        tests: Python sources; one that raises nothing has passed.
        limits: of the process.
        isolation: "full": seccomp refuses sockets, processes, signals to others and the like, and
            Landlock hides the file system but for Python's own files and an empty directory;
            "syscalls": seccomp alone; "none": limits alone.

    Raises:
        NoSandbox: the machine lacks what isolates.
    """
    token = secrets.token_hex(16)
    limit = {
        "cpu_seconds": math.ceil(limits.seconds),
        "memory": limits.memory * _MIB,
        "file_size": limits.file_size * _MIB,
    }
    job = {
        "token": token,
        "program": program,
        "tests": tests,
        "limits": limit,
        "isolation": isolation,
        "readable": _readable(),
    }
    with (
        tempfile.TemporaryDirectory(prefix="jaxtune-code-") as place,
        tempfile.TemporaryFile() as out,
    ):
        process = subprocess.Popen(
            [sys.executable, "-s", "-P", "-B", str(_JAIL)],
            stdin=subprocess.PIPE,
            stdout=out,
            stderr=subprocess.DEVNULL,
            cwd=place,
            env=_environment(place),
            start_new_session=True,
        )
        try:
            process.communicate(json.dumps(job).encode(), timeout=limits.seconds)
            ended = f"ended with {_code(process.returncode)}"
        except subprocess.TimeoutExpired:
            ended = f"did not end within {limits.seconds:g} s"
        finally:
            _end(process)
        out.seek(0)
        said, _, rest = out.read(limits.file_size * _MIB).decode(errors="replace").partition("\n")
    if said == "no jail":
        raise NoSandbox(rest)
    # Only what ran to its end knows the token, so that a program that exits early passes nothing.
    if said == token:
        return Outcome(json.loads(rest), True)
    return Outcome([ended] * len(tests), False)


@functools.cache
def strongest() -> str:
    """Returns the strongest isolation that this machine has."""
    for isolation in ISOLATION[:-1]:
        try:
            run("", [], Limits(), isolation)
            return isolation
        except NoSandbox:  # the next one asks for less
            continue
    return ISOLATION[-1]


def _environment(place: str) -> dict[str, str]:
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    return {
        "PATH": "/usr/bin:/bin",
        "LANG": "C.UTF-8",
        "HOME": place,
        "TMPDIR": place,
        "PYTHONHASHSEED": "0",
        **threads,
    }


def _readable() -> list[str]:
    """What Python and compiled packages are loaded from."""
    own = {sys.prefix, sys.base_prefix, sys.exec_prefix, *sysconfig.get_paths().values()}
    system = ("/usr", "/lib", "/lib64", "/etc/ld.so.cache", "/etc/localtime", "/dev/zero")
    return sorted(own - {"/"}) + list(system)


def _end(process: subprocess.Popen) -> None:
    """Kills the process, and with isolation "none" what stayed in its group."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return  # all of it ended by itself
    finally:
        process.wait()


def _code(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit code {code}"
