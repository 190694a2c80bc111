"""C26: killed with SIGKILL at twenty random moments, a run ends in the undisturbed run's bits.

Whole processes of the command line, killed while they start, train and save. (accelerate #2016)
"""

from __future__ import annotations

import collections
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT, xla_flags
from tests.correctness.tiny_runs import assert_same_run, rows, run_config, steps

KILLS, STEPS, EVERY = 20, 600, 40

pytestmark = pytest.mark.slow


class Command:
    """`jaxtune train` in processes of their own, with one device."""

    def __init__(self, directory: Path):
        self.directory = directory
        self.config = directory / "config.json"
        config = run_config(
            directory / "data",
            peft__targets=["q_proj", "v_proj"],
            grad_accum=1,
            total_steps=STEPS,
            checkpoint__every_steps=EVERY,
            eval__every_steps=15,
            log__every_steps=1,
            log__tensorboard=True,
        )
        self.config.write_text(json.dumps(config))
        # A cache of its own, since a kill may leave half an entry in it.
        self.env = os.environ | {
            "XLA_FLAGS": xla_flags(devices=1),
            "JAX_COMPILATION_CACHE_DIR": str(directory / "cache"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        self.log = directory / "log"
        self.server = subprocess.Popen(
            [sys.executable, "-m", "tests.correctness.killable"],
            env=self.env,
            cwd=ROOT,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log.open("ab"),
        )

    def arguments(self, workdir: Path) -> list[str]:
        return ["train", f"--config={self.config}", f"--workdir={workdir}"]

    def run(self, workdir: Path, kill: dict[str, float] | None = None) -> int:
        """Returns the exit code of a session, negative if a signal ended it."""
        request = {"arguments": self.arguments(workdir), "kill": kill}
        self.server.stdin.write(json.dumps(request) + "\n")
        self.server.stdin.flush()
        return int(self.server.stdout.readline())

    def told(self) -> str:
        return self.log.read_text()[-4000:]


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Command]:
    command = Command(tmp_path_factory.mktemp("killed"))
    yield command
    command.server.stdin.close()
    command.server.wait()


@pytest.fixture(scope="module")
def undisturbed(command: Command) -> Path:
    workdir = command.directory / "undisturbed"
    assert command.run(workdir) == 0, command.told()
    assert len(rows(workdir)) > STEPS
    return workdir


def newest(workdir: Path) -> int:
    """The newest checkpoint's step, 0 without one."""
    return max(steps(workdir), default=0) if (workdir / "checkpoints").exists() else 0


def unfinished(workdir: Path) -> set[tuple[str, int]]:
    """Checkpoints that were being written."""
    found = (workdir / "checkpoints").glob("*tmp*")
    return {(path.name, path.stat().st_ino) for path in found}


def last_step(workdir: Path) -> int:
    """The step of the last whole row of metrics.jsonl, 0 before there is one."""
    path = workdir / "metrics.jsonl"
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return json.loads(lines[-1])["step"] if lines else 0


def test_killed_at_twenty_random_moments(command: Command, undisturbed: Path) -> None:
    workdir = command.directory / "killed"
    chance = random.Random(7)
    # Six kills are spread over the start of a session, seven come within the time of a save after a
    # step that saves, seven in the steps between two saves.
    saves = [EVERY * n for n in sorted(chance.sample(range(1, STEPS // EVERY), 7))]
    between = [save + chance.randrange(EVERY // 2, EVERY) for save in saves]
    targets: list[int | None] = sorted(saves + between)
    for place in (0, 4, 8, 12, 14, 19):
        targets.insert(place, None)
    began = time.monotonic()
    assert command.run(workdir, {"step": 1, "wait": 0.0}) == -signal.SIGKILL, command.told()
    to_first_step = time.monotonic() - began
    phases = collections.Counter(["training"])
    for target in targets[1:]:
        start, old = newest(workdir), unfinished(workdir)
        if target is None:
            kill = {"after": chance.uniform(0.05, 0.95) * to_first_step}
        else:
            wait = chance.uniform(0, 0.15 if target % EVERY == 0 else 0.01)
            kill = {"step": max(target, start + 1), "wait": wait}
        assert command.run(workdir, kill) == -signal.SIGKILL, command.told()
        saving = unfinished(workdir) - old
        phases["saving" if saving else "starting" if target is None else "training"] += 1
    print(f"\n{phases.total()} kills: {dict(phases)}; step {last_step(workdir)} of {STEPS}")
    assert phases.total() == KILLS
    assert command.run(workdir) == 0, command.told()
    assert_same_run(undisturbed, workdir)
    assert steps(workdir) == steps(undisturbed)
    assert not [p for p in workdir.rglob("*") if "tmp" in p.name]


def test_sigterm_saves_and_exits_with_1(command: Command, undisturbed: Path) -> None:
    workdir = command.directory / "preempted"
    process = subprocess.Popen(
        [sys.executable, "-m", "jaxtune.cli", *command.arguments(workdir)],
        env=command.env,
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=command.log.open("ab"),
    )
    while process.poll() is None and last_step(workdir) < 5:
        time.sleep(0.001)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 1, command.told()
    summary = json.loads((workdir / "summary.json").read_text())
    assert summary["stop_reason"] == "preempted" and "SIGTERM" in summary["detail"]
    assert steps(workdir)[-1] == summary["step"] < STEPS
    assert command.run(workdir) == 0, command.told()
    assert_same_run(undisturbed, workdir)
