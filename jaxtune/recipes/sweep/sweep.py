"""Sweeps: a config's trials, each a run in a directory of its own, continued and ranked."""

from __future__ import annotations

import copy
import csv
import dataclasses
import json
import math
import os
import pathlib
import traceback
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from jaxtune.core.errors import RequestError, nearest
from jaxtune.recipes.report.sweep import write_sweep
from jaxtune.recipes.schema.overrides import assign
from jaxtune.recipes.schema.resolve import Resolved, changes, resolve
from jaxtune.recipes.sweep.hyper import Trial, short_name
from jaxtune.recipes.workdir import check_writable
from jaxtune.training.workdir import read_json

Run = Callable[[Resolved, pathlib.Path], Mapping[str, Any]]  # → the run's summary

DONE = ("finished", "budget")


@dataclasses.dataclass(frozen=True)
class Planned:
    """A trial with its place: overrides, complete config, and directory below the workdir."""

    overrides: Trial
    config: Resolved
    directory: str


def plan(base: Mapping[str, Any], trials: Sequence[Trial]) -> list[Planned]:
    """Checks every trial before any of them runs.

    Args:
        base: the raw config, as nested dicts and lists.
        trials: overrides of each.

    Raises:
        RequestError: naming key and trial, for a config that the schema refuses, no trials, or two
            equal ones.
    """
    if not isinstance(trials, list | tuple) or not trials:
        raise RequestError(f"expected a list of trials; got {trials!r}", key="get_hyper")
    planned: list[Planned] = []
    for index, overrides in enumerate(trials):
        if not isinstance(overrides, Mapping):
            raise RequestError(f"expected {{key: value}}; got {overrides!r}", key=f"trial {index}")
        if odd := [key for key in overrides if not isinstance(key, str)]:
            raise RequestError(f"{odd[0]!r} is no key of a config", key=f"trial {index}")
        config = resolve_trial(base, overrides, index)
        twin = next((i for i, other in enumerate(planned) if other.config == config), None)
        if twin is not None:
            raise RequestError(
                f"is the same as trial {twin}: {short_name(overrides)}", key=f"trial {index}"
            )
        name = f"{index:03d}-{short_name(overrides)}"
        planned.append(Planned(dict(overrides), config, f"trials/{name}"))
    return planned


def resolve_trial(base: Mapping[str, Any], overrides: Trial, index: int) -> Resolved:
    """Returns the complete config of one trial."""
    tree = copy.deepcopy(dict(base))
    try:
        for key, value in overrides.items():
            assign(tree, key, value)
        return resolve(tree)
    except RequestError as error:
        raise RequestError(
            f"{error.message} [trial {index}: {short_name(overrides)}]", key=error.key
        ) from None


@dataclasses.dataclass(frozen=True)
class Row:
    """The outcome of a trial: `status` is finished, kept (finished earlier) or failed."""

    trial: str
    status: str
    metric: float | None
    step: int | None
    overrides: Trial
    error: str = ""


def run_sweep(
    planned: Sequence[Planned],
    workdir: pathlib.Path,
    run: Run,
    *,
    metric: str = "eval/loss",
    mode: str = "min",
    allow_change: bool = False,
    report: Callable[[str], None] = print,
) -> list[Row]:
    """Runs the trials one after the other and ranks them.

    A trial that finished earlier is kept, one that was broken off is continued by its run, a failed
    one is recorded in `DIR/error.txt` and the sweep goes on. Writes `sweep.json` (the plan) and
    `results.csv` (after each trial).

    Args:
        planned: from `plan`.
        workdir: directory of the sweep.
        run: trains one config in one directory and returns its summary.
        metric: key of the summary's metrics that ranks.
        mode: `min` or `max`.
        allow_change: keep results of trials whose config has changed since.
        report: gets a line before each trial.

    Returns:
        A row for each trial, best first, failed ones last.

    Raises:
        RequestError: if a trial that is here already was made from another config.
    """
    if mode not in ("min", "max"):
        raise RequestError(f"expected 'min' or 'max'; got {mode!r}", key="--mode")
    check_evaluated(planned, metric)
    check_writable(workdir)
    planned = _placed(planned, workdir, allow_change)
    rows: list[Row] = []
    for i, trial in enumerate(planned):
        directory = workdir / trial.directory
        label = f"[{i + 1}/{len(planned)}] {directory.name}"
        summary = _summary(directory)
        if summary is not None and summary.get("stop_reason") in DONE:
            report(f"{label}: finished earlier")
            rows.append(_row(trial, "kept", summary, metric))
        else:
            report(label)
            rows.append(_run_one(trial, directory, run, metric))
        ranked = rank(rows, mode)
        write_results(ranked, workdir / "results.csv", metric)
        write_sweep(workdir, ranked, metric)
        if rows[-1].status == "preempted":
            break
    done = [row for row in rows if row.status in ("finished", "kept")]
    if done and all(row.metric is None for row in done):
        check_metric(metric, {n for row in done for n in _known_metrics(workdir / row.trial)})
    return ranked


def check_evaluated(planned: Sequence[Planned], metric: str) -> None:
    """Raises RequestError if a metric needs evaluation data that a trial lacks."""
    for trial in planned:
        if metric.startswith("eval/") and not trial.config.data.eval:
            raise RequestError(f"the metric {metric!r} needs evaluation data", key="data.eval")


def check_metric(metric: str, names: Collection[str]) -> None:
    """Raises RequestError unless a run has the metric; `names` are those that it has."""
    if metric not in names:
        raise RequestError(
            f"no trial has the metric {metric!r}{nearest(metric, names)}; there are "
            f"{', '.join(sorted(names))}",
            key="--metric",
        )


def _run_one(trial: Planned, directory: pathlib.Path, run: Run, metric: str) -> Row:
    try:
        summary = dict(run(trial.config, directory))
    except Exception as error:  # recorded, so that one bad trial does not cost the others
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "error.txt").write_text(traceback.format_exc())
        reason = (
            str(error) if isinstance(error, RequestError) else f"{type(error).__name__}: {error}"
        )
        return Row(trial.directory, "failed", None, None, trial.overrides, " ".join(reason.split()))
    (directory / "error.txt").unlink(missing_ok=True)
    stop = summary.get("stop_reason")
    if stop in DONE:
        return _row(trial, "finished", summary, metric)
    status = "preempted" if stop == "preempted" else "failed"
    return dataclasses.replace(_row(trial, status, summary, metric), error=f"stopped: {stop}")


def _row(trial: Planned, status: str, summary: Mapping[str, Any], metric: str) -> Row:
    value = _flat(summary).get(metric)
    step = summary.get("step")
    return Row(
        trial.directory,
        status,
        float(value) if isinstance(value, int | float) else None,
        step if isinstance(step, int) else None,
        trial.overrides,
    )


def _flat(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the summary's numbers by name, wherever in it they stand."""
    out: dict[str, Any] = {}
    for key, value in summary.items():
        if isinstance(value, Mapping):
            out = _flat(value) | out
        elif isinstance(value, int | float) and not isinstance(value, bool):
            out[key] = value
    return out


def _known_metrics(directory: pathlib.Path) -> set[str]:
    return {name for name in _flat(_summary(directory) or {}) if "/" in name or name == "loss"}


def _summary(directory: pathlib.Path) -> dict[str, Any] | None:
    path = directory / "summary.json"
    if not path.exists():
        return None
    return read_json(path)


def _placed(planned: Sequence[Planned], workdir: pathlib.Path, allow_change: bool) -> list[Planned]:
    """Gives trials that are here already their old directory, and writes down the plan."""
    path = workdir / "sweep.json"
    old = _written(path) if path.exists() else []
    placed: list[Planned] = []
    entries = list(old)
    for trial in planned:
        overrides = json.loads(json.dumps(trial.overrides))
        entry = next((e for e in old if e["overrides"] == overrides), None)
        if entry is None:
            name = f"trials/{len(entries):03d}-{short_name(trial.overrides)}"
            entry = {"directory": name, "overrides": overrides, "config": trial.config.to_dict()}
            entries.append(entry)
        elif differing := changes(entry["config"], trial.config.to_dict()):
            key, before, after = differing[0]
            if not allow_change:
                raise RequestError(
                    f"was {before!r} when {entry['directory']} was made, now it is {after!r}; use "
                    "another --workdir, or --allow_change",
                    key=key,
                )
            entry["config"] = trial.config.to_dict()
        placed.append(dataclasses.replace(trial, directory=entry["directory"]))
    workdir.mkdir(parents=True, exist_ok=True)
    _write(path, json.dumps({"trials": entries}, indent=1))
    return placed


def _written(path: pathlib.Path) -> list[dict[str, Any]]:
    """Returns the trials of a sweep.json."""
    trials = read_json(path).get("trials")
    kinds = {"directory": str, "overrides": dict, "config": dict}
    for entry in trials if isinstance(trials, list) else [trials]:
        for name, kind in kinds.items():
            if not isinstance(entry, dict) or not isinstance(entry.get(name), kind):
                raise RequestError(f"is damaged: {entry!r:.60} is no trial", where=path)
    return trials


def rank(rows: Sequence[Row], mode: str) -> list[Row]:
    """Returns the rows best first; those without a finite metric last, in their order."""
    sign = 1 if mode == "min" else -1

    def order(row: Row) -> tuple[int, float]:
        if row.status not in ("finished", "kept"):
            return 2, 0.0
        if row.metric is None or not math.isfinite(row.metric):
            return 1, 0.0
        return 0, sign * row.metric

    return sorted(rows, key=order)


def write_results(rows: Sequence[Row], path: pathlib.Path, metric: str) -> None:
    """Writes ranked rows as CSV: rank, trial, status, metric, step, a column a key, error."""
    keys = list(dict.fromkeys(key for row in rows for key in row.overrides))
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["rank", "trial", "status", metric, "step", *keys, "error"])
        for number, row in enumerate(rows, 1):
            values = [row.overrides.get(key, "") for key in keys]
            value, step = ("" if x is None else x for x in (row.metric, row.step))
            writer.writerow([number, row.trial, row.status, value, step, *values, row.error])
    os.replace(temporary, path)


def _write(path: pathlib.Path, text: str) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)
