"""Stops a run in this process at a chosen moment, and continues it without building it again."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp

from jaxtune.checkpoints.runs import RunCheckpoints
from jaxtune.recipes import train as recipe
from jaxtune.recipes import workdir as files
from jaxtune.recipes.assemble import load_parts
from jaxtune.recipes.build import build
from jaxtune.training import loop
from jaxtune.training.progress import ProgressDisplay
from jaxtune.training.workdir import MetricsFile


class Stopped(BaseException):
    """The run was stopped; no handler of the product takes it."""


class Workbench:
    """Trains like `jaxtune.train`, compiling each config once and noting the batches used."""

    def __init__(self) -> None:
        self._built: dict[str, Any] = {}
        self.batches: list[str] = []

    def train(self, config: dict[str, Any], workdir: Path, **options: Any) -> recipe.Result:
        """Runs or continues; `batches` then holds a hash of each batch of this session."""
        self.batches = []
        place = loop.global_batch

        def noted(batch: dict[str, Any], *where: Any) -> Any:
            digest = hashlib.blake2b(digest_size=8)
            for array in jax.tree.leaves(batch):  # in the order of their names
                digest.update(array.tobytes())
            self.batches.append(digest.hexdigest())
            return place(batch, *where)

        with (
            mock.patch.object(recipe, "build", self._build),
            mock.patch.object(recipe, "load_parts", self._load),
            mock.patch.object(loop, "global_batch", noted),
        ):
            return recipe.train(config, workdir, **options)

    def _build(self, config: Any) -> Any:
        key = json.dumps(config.to_dict())
        if key not in self._built:
            self._built[key] = build(config)
        return self._built[key]

    def _load(self, base: Any, parts: Any, mesh: Any, seed: int, init: str | None) -> Any:
        # The step donates what it is given, so each session gets copies.
        key = f"weights {id(parts)}"
        if key not in self._built:
            self._built[key] = load_parts(base, parts, mesh, seed, init)
        return jax.tree.map(jnp.copy, self._built[key])


@contextmanager
def stopping(owner: Any, name: str, at: Callable[..., bool], *, after: bool) -> Iterator[None]:
    """Raises Stopped from the first call of `owner.name` whose arguments satisfy `at`.

    Args:
        owner, name: the function.
        at: gets the call's arguments.
        after: once the call is done, rather than in its place.
    """
    original = getattr(owner, name)

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if not at(*args, **kwargs):
            return original(*args, **kwargs)
        if after:
            original(*args, **kwargs)
        raise Stopped

    with mock.patch.object(owner, name, wrapped):
        try:
            yield
        except Stopped:
            return
    raise AssertionError(f"{name} was not reached")


def at_the_start() -> Any:
    """After config.json is written, before anything trains."""
    return stopping(files, "begin_session", lambda *a: True, after=True)


def in_the_data(batch: int) -> Any:
    """While the batch after `batch` of this session is awaited."""
    seen = iter(range(batch + 1))
    return stopping(loop, "global_batch", lambda *a: next(seen, None) == batch, after=False)


def after_the_row(step: int) -> Any:
    """After the row of a step is in metrics.jsonl."""
    return stopping(MetricsFile, "append", lambda _, row: row["step"] == step, after=True)


def in_the_evaluation(number: int) -> Any:
    """In place of an evaluation of this session."""
    from jaxtune.recipes.build import Plan

    seen = iter(range(number + 1))
    return stopping(Plan, "evaluate", lambda *a: next(seen, None) == number, after=False)


def before_the_save(step: int) -> Any:
    """In place of the save of a step."""
    return stopping(RunCheckpoints, "save", lambda _, at, *a: at == step, after=False)


def in_the_save(step: int) -> Any:
    """While the checkpoint of a step is being written in the background."""
    return stopping(RunCheckpoints, "save", lambda _, at, *a: at == step, after=True)


def after_the_save(step: int) -> Any:
    """Once the checkpoint of a step is whole."""

    def written(saved: RunCheckpoints, *args: Any) -> None:
        save(saved, *args)
        saved.wait()

    save = RunCheckpoints.save
    stack = ExitStack()
    stack.enter_context(mock.patch.object(RunCheckpoints, "save", written))
    stack.enter_context(in_the_save(step))
    return stack


def before_the_summary() -> Any:
    """After the last checkpoint, before summary.json."""
    return stopping(recipe, "summarise", lambda *a: True, after=False)


@contextmanager
def sigterm_at(step: int) -> Iterator[None]:
    """Sends this process SIGTERM once, when the metrics of a step are shown."""
    update = ProgressDisplay.update

    def told(self: Any, done: int, *rest: Any) -> None:
        update(self, done, *rest)
        if done == step:
            os.kill(os.getpid(), signal.SIGTERM)

    with mock.patch.object(ProgressDisplay, "update", told):
        yield
