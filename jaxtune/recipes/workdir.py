"""What a workdir says about the run in it, and whether a config may continue it."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import shutil
import tempfile
import textwrap
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jaxtune.checkpoints import pareto
from jaxtune.checkpoints.pareto import Aims
from jaxtune.checkpoints.runs import RunCheckpoints
from jaxtune.core.errors import RequestError
from jaxtune.core.places import copy_up, is_remote, move, place
from jaxtune.recipes.schema.resolve import changes
from jaxtune.recipes.schema.retention import METRICS_OF as BOUNDS
from jaxtune.training.stop import FINISHED, RETENTION
from jaxtune.training.workdir import read_json, write_json

CONFIG, SUMMARY, METRICS = "config.json", "summary.json", "metrics.jsonl"
RETAINED = "retention.json"  # what was measured of what is to be retained, before the first step
SAMPLES = "samples.jsonl"  # what online objectives sampled, a few completions an iteration
CHECKPOINTS, DAMAGED, LOCK = "checkpoints", "damaged", ".lock"


def check_config(workdir: Path, config: Mapping[str, Any], allow_change: bool) -> None:
    """Raises RequestError if the workdir cannot hold a run, or holds one of another config.

    Args:
        workdir: the directory.
        config: the resolved config, as `to_dict` gives it.
        allow_change: continue a run of another config.
    """
    check_writable(workdir)
    check_writable(workdir / CHECKPOINTS)
    if not (workdir / CONFIG).exists():
        if any(path.name.isdigit() for path in (workdir / CHECKPOINTS).glob("*")):
            raise RequestError(
                f"holds checkpoints, but the {CONFIG} of their run is missing; use another one",
                key="--workdir",
                where=workdir,
            )
        return
    old = read_json(workdir / CONFIG)
    if "objective" not in old:
        raise RequestError(
            f"holds another thing than a run: its {CONFIG} is not one of ours",
            key="--workdir",
            where=workdir,
        )
    changed = changes(old, config)
    if changed and not allow_change:
        key, old, new = changed[0]
        more = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
        raise RequestError(
            f"the run was started with {old!r}, not {new!r}{more}; use another --workdir, or "
            "--allow_change",
            key=key,
            where=workdir / CONFIG,
        )


def check_writable(workdir: Path) -> None:
    """Raises RequestError unless the workdir can be made or written to."""
    if is_remote(workdir):
        scheme, _, rest = str(workdir).partition("://")
        bucket = place(f"{scheme}://{rest.partition('/')[0]}")
        try:
            if not bucket.exists():
                raise FileNotFoundError(f"there is no {bucket}, or it cannot be read")
        except Exception as error:  # each store's package raises its own
            reason = textwrap.shorten(f"{type(error).__name__}: {error}", 300, placeholder=" …")
            raise RequestError(
                f"cannot be reached: {reason}", key="--workdir", where=workdir
            ) from error
        return
    for path in (workdir, *workdir.parents):
        if not os.path.lexists(path):
            continue
        if not path.is_dir():
            raise RequestError("is not a directory", key="--workdir", where=path)
        if not os.access(path, os.W_OK | os.X_OK):
            raise RequestError("cannot be written to", key="--workdir", where=path)
        return


def check_fingerprints(
    workdir: Path, saved: Mapping[str, Any], now: Mapping[str, Any], allow_change: bool
) -> None:
    """Raises RequestError if base, data or tokenizer are not those that the run began with."""
    keys = {
        "base": "model",
        "data": "data.train",
        "evaluation data": "data.eval",
        "tokenizer": "model.tokenizer",
        "teacher": "objective.teacher",
        "replay data": "retention.replay_data",
    }
    for name, value in now.items():
        if saved.get(name) != value and not allow_change:
            raise RequestError(
                f"the {name} changed since the run began (fingerprint {saved.get(name)}, now "
                f"{value}); restore it, or use --allow_change",
                key=keys[name],
                where=workdir,
            )


def digests(workdir: Path, summary: Mapping[str, Any]) -> dict[str, str | None]:
    """Returns every fingerprint of a run: those of its summary, and of what it retains.

    Args:
        workdir: of the run.
        summary: its summary, or {}.
    """
    path = workdir / RETAINED
    kept = read_json(path).get("data") if path.is_file() else None
    return {**summary.get("fingerprints", {}), "retention data": kept}


@contextmanager
def claimed(workdir: Path) -> Iterator[None]:
    """Makes the workdir and holds it for this process; the system lets go when the process ends.

    Object stores have no locks; there the user alone keeps runs apart.

    Raises:
        RequestError: another process trains in it, or it cannot be written.
    """
    if is_remote(workdir):
        yield
        return
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        handle = os.open(workdir / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise RequestError(
            f"cannot be written: {error.strerror}", key="--workdir", where=workdir
        ) from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            # Some network file systems have no locks; there the user alone keeps runs apart.
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise RequestError(
                    "another process is training in it", key="--workdir", where=workdir
                ) from error
        yield
    finally:
        os.close(handle)


def begin_session(workdir: Path, config: Mapping[str, Any], tokenizer: Any) -> None:
    """Writes what the workdir says of the run; the summary of an earlier session goes first.

    A run that is continued beyond its end must not look finished if it is killed on the way.
    """
    (workdir / SUMMARY).unlink(missing_ok=True)
    write_json(workdir / CONFIG, config)
    save_tokenizer(workdir, tokenizer)


def save_tokenizer(workdir: Path, tokenizer: Any) -> None:
    """Keeps the run's tokenizer in `tokenizer/`, so that the run needs no other place for it."""
    if tokenizer is None or (workdir / "tokenizer").exists():
        return
    if is_remote(workdir):
        with tempfile.TemporaryDirectory() as aside:
            tokenizer.save(Path(aside))
            copy_up(Path(aside), workdir / "tokenizer")
        return
    aside = workdir / ".tokenizer.tmp"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    tokenizer.save(aside)
    aside.rename(workdir / "tokenizer")


def open_checkpoints(workdir: Path, config: Any, *, reading: bool = False) -> RunCheckpoints:
    """Returns the checkpoints of a run; with `reading`, nothing on disk is changed."""
    return RunCheckpoints(
        workdir / CHECKPOINTS,
        keep=config.checkpoint.keep,
        best=config.checkpoint.keep_best,
        async_save=config.checkpoint.async_save,
        aims=aims_of(config),
        reading=reading,
    )


def result_step(saved: RunCheckpoints, config: Any, pick: str | None = None) -> int | None:
    """Returns the checkpoint that a run's result is; None if it has none.

    That is the best by `checkpoint.keep_best`, else, where the run rolls back, the newest within
    the bounds of `retention`, else the newest.

    Args:
        saved: its checkpoints.
        config: its resolved config.
        pick: one of `pareto.PICKS`, in place of the above.

    Raises:
        RequestError: no checkpoint was measured by both aims, or none is within the bound.
    """
    if pick is not None:
        points = saved.points() if saved.aims else {}
        if not points:
            raise RequestError(
                "no checkpoint of the run was measured on both data.eval and retention.data",
                key="pick",
                where=saved.directory,
            )
        return pareto.pick(points, pick)
    if config.retention.on_rise != "rollback" or config.checkpoint.keep_best is not None:
        return saved.best_step()
    bounds = {name: config.retention[key] for key, name in BOUNDS.items()}
    bounds = {name: bound for name, bound in bounds.items() if bound is not None}
    steps = saved.steps()
    inside = [step for step in steps if within(saved.meta(step)["metrics"], bounds)]
    if steps and not inside:
        told = ", ".join(f"{name} ≤ {bound:g}" for name, bound in bounds.items())
        raise RequestError(
            f"no checkpoint is within {told}; save more often", where=saved.directory
        )
    return max(inside, default=None)


def within(metrics: Mapping[str, float], bounds: Mapping[str, float]) -> bool:
    """Tells whether all metrics that are bounded were measured, and none is past its bound."""
    return all(metrics.get(n) is not None and metrics[n] <= b for n, b in bounds.items())


def put_aside(workdir: Path, damaged: Mapping[int, str], start: int) -> None:
    """Moves damaged checkpoints out of the way of those that the run will write, with a warning."""
    for step, reason in damaged.items():
        target = workdir / DAMAGED / str(step)
        number = 0
        while target.exists():
            number += 1
            target = workdir / DAMAGED / f"{step}.{number}"
        move(workdir / CHECKPOINTS / str(step), target)
        logging.getLogger("jaxtune").warning(
            "%s; moved to %s; the run goes on from step %d", reason, target, start
        )


def note_failure(workdir: Path, note: Mapping[str, Any]) -> None:
    """Writes why a run failed; on a full disk, in the place that a half checkpoint took."""
    if not is_remote(workdir):
        remove_halves(workdir / CHECKPOINTS)
    try:
        write_json(workdir / SUMMARY, note)
    except OSError as error:
        logging.getLogger("jaxtune").warning("%s cannot be written: %s", workdir / SUMMARY, error)


def remove_halves(directory: Path) -> None:
    """Removes half checkpoints; a thread of the failed save may still be putting files there."""
    for _ in range(20):
        halves = list(directory.glob("*tmp*"))
        if not halves:
            return
        for half in halves:
            shutil.rmtree(half, ignore_errors=True)
        time.sleep(0.1)


def last_metrics(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns the last training row together with the last evaluation, without the step."""
    last: dict[bool, dict[str, Any]] = {}
    for row in rows:
        last["loss" not in row] = row
    merged = last.get(False, {}) | last.get(True, {})
    return {name: value for name, value in merged.items() if name != "step"}


def finished(workdir: Path) -> dict[str, Any] | None:
    """Returns the summary of a run that is done, or None."""
    path = workdir / SUMMARY
    if not path.exists():
        return None
    summary = read_json(path)
    return summary if summary.get("stop_reason") in (FINISHED, RETENTION) else None


def aims_of(config: Any) -> Aims | None:
    """Returns the two metrics whose front of checkpoints a run keeps; None: it keeps none."""
    if not (config.retention.data and config.data.eval):
        return None
    return config.checkpoint.keep_best or "eval/loss", "retention/nll"
