"""One session of a run: the hooks of the loop, from where the run was to where it stops."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from jaxtune.core.tree import Tree, unflatten
from jaxtune.parallel import processes
from jaxtune.parallel.batches import held_rows, on_all
from jaxtune.parallel.processes import is_writer
from jaxtune.peft.registry import spec_of
from jaxtune.recipes import reference_data
from jaxtune.recipes import workdir as files
from jaxtune.recipes.build import Plan
from jaxtune.recipes.report import showcase
from jaxtune.recipes.retention import measured as retention
from jaxtune.recipes.retention import replay_mixing
from jaxtune.training import stop, writers
from jaxtune.training.loop import Hooks, Outcome, Totals, run_loop
from jaxtune.training.progress import ProgressDisplay
from jaxtune.training.state import TrainState
from jaxtune.training.workdir import MetricsFile, metrics_file


@dataclasses.dataclass(frozen=True)
class Begun:
    """A run at the moment from which it goes on.

    Attributes:
        state, frozen: all parameters and what training carries.
        totals: what the run has seen before.
        fingerprints: of base, data and tokenizer.
        damaged: {step: what is wrong with it} of newer checkpoints.
        start: a copy of the trained parameters before the first step, where the objective keeps it.
        feed: {path: array} that the feed had saved; see `training.feed.Source`.
    """

    state: TrainState
    frozen: Tree
    totals: Totals
    fingerprints: dict[str, str | None]
    damaged: dict[int, str] = dataclasses.field(default_factory=dict)
    start: Tree | None = None
    feed: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)


def run(
    plan: Plan,
    begun: Begun,
    workdir: Path,
    metrics: MetricsFile,
    console: Console | None,
    seconds_limit: float,
) -> tuple[Outcome, Totals]:
    """Trains from where the run was to its end, or until something stops it."""
    start, frozen = int(begun.state.step), begun.frozen
    if begun.damaged:
        if is_writer():
            files.put_aside(workdir, begun.damaged, start)
        processes.wait_for_all("damaged checkpoints")
    if start == 0:
        reference_data.check(plan, begun.state.trainable, frozen)
    rows = held_rows(plan.config.batch_size, plan.config.data.seq_len, plan.mesh)
    samples = metrics_file(workdir / files.SAMPLES)
    with ExitStack() as stack:
        saved = files.open_checkpoints(workdir, plan.config)
        stack.callback(saved.close)
        write: list[writers.Write] = []
        if is_writer():
            metrics.rewind(start)
            if samples.rows():
                samples.rewind(start)
            write = open_writers(plan, workdir, metrics, start, stack)
            stack.callback(samples.flush)
        display = stack.enter_context(ProgressDisplay(console, plan.data.budget.steps, start))
        request = stack.enter_context(stop.on_sigterm())

        def log(row: dict[str, Any]) -> None:
            saved.check()  # a save that failed in the background ends the run here
            for put in write:
                put(row)

        def note(row: dict[str, Any]) -> None:
            if is_writer():
                samples.append(row)
                for put in write[1:]:
                    put({"step": row["step"], **texts(row)})

        source = plan.objective.open_feed(plan, begun, note)
        source = replay_mixing.with_rows(source, plan, start)
        before = begin_retention(plan, begun, workdir, log)
        if start == 0:
            showcase.show(plan, workdir, "before", begun.state.trainable, frozen)

        def evaluate(state: TrainState) -> dict[str, float]:
            found = plan.evaluate(state.trainable, frozen)
            if plan.retention is None:
                return found
            kept = plan.retention.measure(state.trainable, frozen)
            return found | retention.against(before, kept)

        def save(step: int, state: TrainState, totals: Totals, result: dict[str, float]) -> None:
            if is_writer():
                metrics.flush()
                samples.flush()
            saved.save(
                step,
                {"trainable": state.trainable, "fixed": unflatten(plan.parts.fixed(frozen))},
                dataclasses.replace(state, trainable=None),
                {
                    "fingerprints": begun.fingerprints,
                    "method": spec_of(plan.parts.method),
                    "totals": dataclasses.asdict(totals),
                    "data": {"next": step},
                },
                result,
                on_all(source.arrays(), plan.mesh),
            )

        outcome = run_loop(
            compiled_together(plan),
            begun.state,
            frozen,
            source.feed,
            Hooks(log, evaluate, save, display.update, gate_of(plan)),
            begun.totals,
            mesh=plan.mesh,
            total_steps=plan.data.budget.steps,
            log_every=plan.config.log.every_steps,
            eval_every=plan.config.eval.every_steps,
            save_every=plan.config.checkpoint.every_steps,
            stop=request,
            rows=rows,
            seconds_limit=seconds_limit,
        )
        saved.wait()
        if outcome.stop_reason in (stop.FINISHED, stop.RETENTION):
            showcase.show(plan, workdir, "after", outcome.state.trainable, frozen)
    processes.wait_for_all("end of training")
    return outcome, begun.totals


def begin_retention(
    plan: Plan, begun: Begun, workdir: Path, log: Callable[[dict[str, Any]], None]
) -> retention.Kept | None:
    """Returns what is retained at the start of the run, which is logged as step 0."""
    if plan.retention is None:
        return None

    def measure() -> retention.Kept:
        return plan.retention.measure(begun.state.trainable, begun.frozen)

    step = int(begun.state.step)
    before, now = retention.begin(plan.retention, workdir, step, measure)
    if now:
        log({"step": step, **retention.against(before, before)})
    return before


def gate_of(plan: Plan) -> Callable[[dict[str, float]], str | None]:
    """Returns what may end the run after an evaluation."""
    return (lambda _: None) if plan.retention is None else plan.retention.gate


def texts(row: dict[str, Any]) -> dict[str, str]:
    """Returns a row of `samples.jsonl` as TensorBoard shows it, a Markdown code block."""
    body = json.dumps({name: value for name, value in row.items() if name != "step"}, indent=1)
    return {f"samples/{row.get('number', 0)}": f"```\n{body}\n```"}


def compiled_together(plan: Plan) -> Callable:
    """Returns the step; of several processes, once all have compiled it.

    The first collective of the fastest must not wait for the compiler of the slowest: gloo gives
    up after 30 seconds.
    """
    if not processes.joined():
        return plan.step
    step = plan.step.lower(*plan.abstract_arguments()).compile()
    processes.gather("compiled step", None)
    return step


def open_writers(
    plan: Plan, workdir: Path, metrics: MetricsFile, start: int, stack: ExitStack
) -> list[writers.Write]:
    """Returns what takes the rows of metrics; the stack closes it."""
    write: list[writers.Write] = [metrics.append]
    opened = []
    if plan.config.log.tensorboard:
        opened.append(writers.tensorboard(workdir / "tensorboard", start))
    if plan.config.log.wandb:
        opened.append(writers.wandb(workdir, plan.config.to_dict()))
    for put, close in opened:
        write.append(put)
        stack.callback(close)
    stack.callback(metrics.flush)
    return write
