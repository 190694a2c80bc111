"""Tasks of lm-evaluation-harness on a loaded model."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxtune.core.errors import RequestError, nearest
from jaxtune.recipes.language_model import LanguageModel


@dataclasses.dataclass(frozen=True)
class Tasks:
    """Tasks that are loaded, with their data.

    Attributes:
        manager: lm_eval's TaskManager.
        loaded: lm_eval's Task and Group objects.
    """

    manager: Any
    loaded: tuple[Any, ...]


def find_tasks(names: Sequence[str], include_path: str | Path | None = None) -> Tasks:
    """Returns the tasks of these names.

    lm_eval's own tasks, some 13,000 files, are looked through only for a name that the directory
    does not have.

    Args:
        names: of tasks, groups or tags, or patterns of names.
        include_path: directory of task files (YAML) beside lm_eval's own.

    Raises:
        RequestError: lm_eval is not installed, no such directory, no such task, or one whose
            files or data cannot be read.
    """
    if not names:
        raise RequestError("names no task", key="--tasks")
    if include_path is not None and not Path(include_path).is_dir():
        raise RequestError(f"no such directory: {str(include_path)!r}", key="--include_path")
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise RequestError(
            f"needs lm-evaluation-harness: pip install 'jaxtune[eval]' ({error})", key="--tasks"
        ) from error
    path = None if include_path is None else str(include_path)
    manager = TaskManager(include_path=path, include_defaults=path is None)
    if path is not None and not all(manager.match_tasks([name]) for name in names):
        manager = TaskManager(include_path=path)
    found: list[str] = []
    for name in names:
        matched = manager.match_tasks([name])
        if not matched:
            raise RequestError(
                f"unknown task {name!r}{nearest(name, manager.all_tasks)}", key="--tasks"
            )
        found += [other for other in matched if other not in found]
    return Tasks(manager, tuple(task for name in found for task in _load(manager, name)))


def run_tasks(
    lm: LanguageModel,
    tasks: Tasks,
    *,
    limit: int | None = None,
    batch_size: int | None = None,
) -> dict[str, dict[str, float]]:
    """Returns {task: {metric: value}}, groups of tasks included.

    A metric has lm_eval's name; behind a comma, that of the filter where there is one.

    Args:
        lm: the model; on a mesh, rows are spread over it.
        tasks: what `find_tasks` gave.
        limit: the first so many examples of each task.
        batch_size: rows at a time; does not change the result.

    Raises:
        RequestError: a model without a tokenizer, or a task that asks for what it cannot do.
    """
    import lm_eval

    from jaxtune.recipes.evaluation.harness_model import HarnessModel

    model = HarnessModel(lm, batch_size=batch_size)
    # Its bootstrap would fork a process that has jax's threads.
    os.environ.setdefault("DISABLE_MULTIPROC", "1")
    # It prints; the standard output belongs to the result.
    with contextlib.redirect_stdout(sys.stderr):
        results = lm_eval.simple_evaluate(
            model=model,
            tasks=list(tasks.loaded),
            task_manager=tasks.manager,
            limit=limit,
            log_samples=False,
        )
    return {name: _numbers(metrics) for name, metrics in results["results"].items()}


def _load(manager: Any, name: str) -> list[Any]:
    """Returns the tasks of a name; lm_eval's own errors say little, and not about which task."""
    try:
        with contextlib.redirect_stdout(sys.stderr):
            loaded = manager.load([name])
    except Exception as error:  # any class: YAML, Jinja, datasets and the network are behind it
        first = str(error).strip().splitlines()[:1] or [""]
        raise RequestError(
            f"cannot load {name!r}: {type(error).__name__}: {first[0]}", key="--tasks"
        ) from error
    inside = {task for group in loaded["groups"].values() for task in group.child_names}
    return [
        task
        for kind in ("groups", "tasks")
        for found, task in loaded[kind].items()
        if found not in inside
    ]


def _numbers(metrics: dict[str, Any]) -> dict[str, float]:
    """Returns what is a number, as Python's own, under names without lm_eval's `,none`."""
    return {
        key.removesuffix(",none"): float(value)
        for key, value in metrics.items()
        if "," in key and not isinstance(value, str | bool) and value is not None
    }
