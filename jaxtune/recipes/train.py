"""`jaxtune train`: starts a run in a workdir, or continues it exactly."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console

from jaxtune.checkpoints.runs import DamagedCheckpoint, RunCheckpoints
from jaxtune.core.errors import RequestError
from jaxtune.core.places import place
from jaxtune.core.tree import Tree, flatten, unflatten
from jaxtune.optim.anchor import with_importance
from jaxtune.parallel import processes
from jaxtune.parallel.processes import is_writer
from jaxtune.parallel.rules import replicated
from jaxtune.recipes import reference_data
from jaxtune.recipes import workdir as files
from jaxtune.recipes.assemble import load_parts
from jaxtune.recipes.budget import chip_of, seconds_of, spent
from jaxtune.recipes.build import Plan, build
from jaxtune.recipes.report.page import write_report
from jaxtune.recipes.schema.resolve import resolve
from jaxtune.recipes.session import Begun, run
from jaxtune.recipes.versions import code_fingerprint, versions
from jaxtune.training import stop
from jaxtune.training.compile import fresh_state
from jaxtune.training.loop import Outcome, Totals
from jaxtune.training.memory import peak_memory
from jaxtune.training.state import TrainState
from jaxtune.training.workdir import MetricsFile, metrics_file, write_json


@dataclasses.dataclass(frozen=True)
class Result:
    """A run as it stands.

    Attributes:
        summary: what `summary.json` holds.
        history: the rows of `metrics.jsonl`.
    """

    summary: dict[str, Any]
    history: list[dict[str, Any]]


def train(
    config: Mapping[str, Any],
    workdir: str | Path,
    *,
    allow_change: bool = False,
    budget: str | None = None,
    price: str | float | None = None,
    console: Console | None = None,
) -> Result:
    """Runs a config in a workdir; if the workdir holds a part of the run, continues it exactly.

    Args:
        config: a ConfigDict or mapping; see `docs/config.md`.
        workdir: the run's directory, made if it is missing.
        allow_change: continue although config, data, tokenizer or base weights changed.
        budget: how long the run may train, all sessions together: `3h`, `90min`, or `20USD` at the
            price of this machine's devices. The run then stops with reason `budget`, and goes on
            with a larger one.
        price: US dollars an hour of one device, in place of its list price.
        console: where progress is shown; None shows nothing.

    Returns:
        The Result; `summary["stop_reason"]` says how the run ended.

    Raises:
        RequestError: config, data, checkpoint or workdir cannot be honoured; the workdir is as it
            was before.
    """
    config, workdir = resolve(config), place(workdir, "--workdir")
    limit = math.inf if budget is None else seconds_of(budget, price)
    if price is not None:
        chip_of(jax.devices(), price)  # a mistake in it is told now, not after the run
    files.check_config(workdir, config.to_dict(), allow_change)
    metrics = metrics_file(workdir / files.METRICS)
    rows = metrics.rows()
    done = files.finished(workdir)
    if done is not None and not allow_change:
        return Result(done, rows)
    plan = build(config)
    if console is not None and is_writer():
        plan.show_findings(console)
    with jax.set_mesh(plan.mesh), ExitStack() as stack:
        started, begun = time.time(), None
        try:
            begun = begin(plan, workdir, allow_change)
            reference_data.check_kept(plan, workdir)
            # Up to here nothing was written, and all that a process can refuse it has refused.
            processes.wait_for_all("start")
            processes.summary_path(workdir / files.SUMMARY)
            if is_writer():
                stack.enter_context(files.claimed(workdir))
                files.begin_session(workdir, config.to_dict(), plan.base.tokenizer)
                if console is not None:
                    console.print(f"attention: {plan.attention}", highlight=False)
            outcome, totals = run(
                with_start(plan, begun, workdir),
                begun,
                workdir,
                metrics,
                console if is_writer() else None,
                limit,
            )
        except RequestError:
            raise
        except Exception as error:
            processes.wait_for_news()
            if begun is None and isinstance(error, OSError):
                raise  # a file that the request names; nothing was written
            note = failure(error, begun, metrics, time.time() - started)
            if is_writer():
                files.note_failure(workdir, note)
            error.add_note(f"the run failed; see {workdir / files.SUMMARY}")
            raise
        rows = metrics.rows()
        summary = summarise(plan, outcome, totals, rows, time.time() - started, price)
        if begun.damaged:
            summary["damaged_checkpoints"] = {str(s): told for s, told in begun.damaged.items()}
        if is_writer():
            write_json(workdir / files.SUMMARY, summary)
            write_report(workdir)
    return Result(summary, rows)


def failure(
    error: Exception, begun: Begun | None, metrics: MetricsFile, seconds: float
) -> dict[str, Any]:
    """Returns what `summary.json` holds of a run that an error ended: as much as is known.

    `step` is the last that was logged.
    """
    note = {
        "stop_reason": stop.ERROR,
        "error": f"{type(error).__name__}: {error}",
        "session_seconds": seconds,
    }
    if begun is None:
        return note
    rows = metrics.rows()
    return note | {
        "step": rows[-1]["step"] if rows else 0,
        "metrics": files.last_metrics(rows),
        "wall_seconds": begun.totals.seconds,
        "fingerprints": begun.fingerprints,
    }


def begin(plan: Plan, workdir: Path, allow_change: bool) -> Begun:
    """Returns the run as the newest whole checkpoint has it, or fresh; nothing is written.

    Raises:
        RequestError: base, data or tokenizer changed, or the checkpoint does not fit, or there are
            checkpoints but none of them is whole.
    """
    fingerprints = plan.fingerprints()
    saved = files.open_checkpoints(workdir, plan.config, reading=True)
    params: Tree = None
    damaged: dict[int, str] = {}
    try:
        for step in [*reversed(saved.steps()), None]:
            if step is None and damaged:
                break
            told = None
            try:
                seen = seen_at(plan, workdir, saved, step, fingerprints, allow_change)
                if params is None:
                    init = plan.config.peft.get("init_from")
                    params = load_parts(plan.base, plan.parts, plan.mesh, plan.config.seed, init)
                state, frozen = restore(plan, params, saved, step)
                fed = {} if step is None else saved.restore_feed(step, replicated(plan.mesh))
            except DamagedCheckpoint as error:
                told = str(error)
            # A checkpoint of which one process cannot read its part serves none of them.
            told = next(filter(None, processes.gather("checkpoint", told)), None)
            if told is None:
                start = None
                if plan.objective.keeps_start(plan.config):
                    # The step donates its state, which may hold the arrays that were loaded.
                    start = jax.tree.map(jnp.copy, plan.parts.split(params)[0])
                return Begun(state, frozen, seen, fingerprints, damaged, start, fed)
            damaged[step] = told
    finally:
        saved.close()
    raise RequestError(f"{damaged[max(damaged)]}; no checkpoint of the run is whole")


def parameters_at_start(plan: Plan, begun: Begun) -> tuple[Tree, Tree]:
    """Returns (trained, the rest) of the parameters as they were at step 0."""
    if int(begun.state.step) == 0:
        return begun.state.trainable, begun.frozen
    init = plan.config.peft.get("init_from")
    return plan.parts.split(load_parts(plan.base, plan.parts, plan.mesh, plan.config.seed, init))


def with_start(plan: Plan, begun: Begun, workdir: Path) -> Plan:
    """Returns the plan with what it compares with the parameters at step 0, where it does so."""

    def start() -> tuple[Tree, Tree]:
        return parameters_at_start(plan, begun)

    whole = reference_data.with_reference(plan, start, workdir)
    if plan.retention is None:
        return whole
    return dataclasses.replace(whole, retention=plan.retention.with_start(start))


def seen_at(
    plan: Plan,
    workdir: Path,
    saved: RunCheckpoints,
    step: int | None,
    fingerprints: dict[str, str | None],
    allow_change: bool,
) -> Totals:
    """Returns what the run had seen at a checkpoint, from which it may go on.

    Raises:
        DamagedCheckpoint: the checkpoint does not say.
        RequestError: base, data or tokenizer changed, or the run is beyond its end.
    """
    if step is None:
        return Totals()
    meta = saved.meta(step)
    with saved.blamed(step):
        seen = Totals(**meta["totals"])
        files.check_fingerprints(workdir, meta["fingerprints"], fingerprints, allow_change)
    if step > plan.data.budget.steps:
        raise RequestError(
            f"the run is at step {step} already; {plan.data.budget.steps} steps were asked for",
            where=workdir,
        )
    return seen


def restore(
    plan: Plan, params: Tree, saved: RunCheckpoints, latest: int | None
) -> tuple[TrainState, Tree]:
    """Returns (state, frozen): fresh, or as the newest checkpoint has them."""
    trainable, frozen = plan.parts.split(params)
    if latest is None:
        state = fresh_state(trainable, plan.tx, plan.config.seed, plan.layout)
        if plan.config.retention.ewc:
            found = plan.retention.importance(state.trainable, frozen)
            held = with_importance(state.opt_state, found)
            state = dataclasses.replace(state, opt_state=held)
        return state, frozen
    model = saved.restore(latest, "model", plan.parts.saved_shapes())
    rest = saved.restore(latest, "state", dataclasses.replace(plan.layout.shapes, trainable=None))
    held = flatten(model["fixed"])
    frozen = unflatten({path: held.get(path, leaf) for path, leaf in flatten(frozen).items()})
    return dataclasses.replace(rest, trainable=model["trainable"]), frozen


def summarise(
    plan: Plan,
    outcome: Outcome,
    totals: Totals,
    rows: list[dict[str, Any]],
    seconds: float,
    price: str | float | None,
) -> dict[str, Any]:
    """Returns what `summary.json` holds."""
    devices = list(plan.mesh.devices.flat)
    summary = {
        "stop_reason": outcome.stop_reason,
        "step": outcome.step,
        "total_steps": plan.data.budget.steps,
        "metrics": files.last_metrics(rows),
        "tokens": totals.tokens,
        "trained_tokens": totals.trained_tokens,
        "steps_without_targets": totals.empty_steps,
        "wall_seconds": totals.seconds,
        "session_seconds": seconds,
        "parameters": plan.parts.counts(),
        **plan.data.told(),
        "fingerprints": plan.fingerprints(),
        "devices": len(devices),
        "platform": devices[0].platform,
        "cost": spent(totals.seconds, devices, price),
        "memory": peak_memory(),
        "attention": dataclasses.asdict(plan.attention),
        "versions": versions(),
        "code": code_fingerprint(),
    }
    if outcome.detail is not None:
        summary["detail"] = outcome.detail
    return summary
