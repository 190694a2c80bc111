"""The loop around the step: what happens at which step, and why it ends."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from jaxtune.core.tree import Tree, without_holes
from jaxtune.parallel.batches import Rows, global_batch
from jaxtune.training.feed import Feed
from jaxtune.training.state import TrainState
from jaxtune.training.step import BAD_LEAF
from jaxtune.training.stop import BUDGET, FINISHED, NON_FINITE, RETENTION, StopRequest, reason_of

Row = dict[str, Any]


@dataclasses.dataclass
class Totals:
    """What the run has seen so far; saved with each checkpoint."""

    tokens: int = 0
    trained_tokens: int = 0
    seconds: float = 0.0
    empty_steps: int = 0


@dataclasses.dataclass(frozen=True)
class Hooks:
    """What the loop calls.

    Attributes:
        log: a row of `metrics.jsonl`.
        evaluate: state → {"eval/…": value}.
        save: (step, state, totals, metrics of this step's evaluation; empty without one).
        progress: (step, loss, tokens a second), every step.
        gate: metrics of an evaluation → why the run may not go on, or None.
    """

    log: Callable[[Row], None]
    evaluate: Callable[[TrainState], dict[str, float]]
    save: Callable[[int, TrainState, Totals, dict[str, float]], None]
    progress: Callable[[int, float, float], None]
    gate: Callable[[dict[str, float]], str | None] = lambda _: None


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How the loop ended.

    Attributes:
        state: the last state, of no use where it is not finite.
        stop_reason: one of `training.stop`.
        step: steps done.
        detail: more on the reason, for a person.
    """

    state: TrainState
    stop_reason: str
    step: int
    detail: str | None = None


def run_loop(
    step_fn: Callable,
    state: TrainState,
    frozen: Tree,
    feed: Feed,
    hooks: Hooks,
    totals: Totals,
    *,
    mesh: Mesh,
    total_steps: int,
    log_every: int,
    eval_every: int | None,
    save_every: int | None,
    stop: StopRequest,
    rows: Rows | None = None,
    seconds_limit: float = math.inf,
) -> Outcome:
    """Runs from the state's step to `total_steps`, or until something stops it.

    The metrics of a step are read while the next one runs, so that the device never waits for
    the host; before a save they are read first, so that no bad state is ever saved. Evaluation
    and saving come at multiples of their period and at the end; a stop that was asked for saves
    first. `seconds_limit` bounds the training time of the whole run, earlier sessions included; the
    step in which it is reached is the last.

    `feed` is asked for a batch before each step; it may look at the state, as sampling does. `rows`
    says which rows of each global batch it gives; None: all.
    """
    step = int(state.step)
    started, first = time.perf_counter() - totals.seconds, step
    interval = (time.perf_counter(), step, 0)
    pending: tuple[int, dict[str, jax.Array], dict[str, float]] | None = None

    def settle() -> Outcome | None:
        """Reads the pending step's metrics; returns the end of the run if they are not finite."""
        nonlocal pending, interval
        if pending is None:
            return None
        done, report, fed = pending[0], jax.device_get(pending[1]), pending[2]
        pending = None
        values = {name: float(value) for name, value in report.items()}
        totals.tokens += round(values.pop("tokens"))
        totals.trained_tokens += round(trained := values.pop("trained_tokens"))
        totals.empty_steps += trained == 0
        now = time.perf_counter()
        totals.seconds = now - started
        since, at, tokens_then = interval
        seconds = (now - since) / (done - at)
        rate = (totals.tokens - tokens_then) / (now - since) if at > first else 0.0
        leaf = int(values.pop(BAD_LEAF))
        bad = [name for name in ("loss", "grad_norm") if not math.isfinite(values[name])]
        if leaf >= 0 or bad:
            names = list(without_holes(state.trainable))
            place = f"the gradient of {names[leaf]}" if leaf >= 0 else f"the {bad[0]}"
            detail = f"step {done}: {place} is not finite"
            return Outcome(state, NON_FINITE, done, detail)
        hooks.progress(done, values["loss"], rate)
        # Which steps are logged does not depend on where the run was broken off.
        if done % log_every == 0 or done == total_steps or done == 1:
            hooks.log(
                {
                    "step": done,
                    **values,
                    **fed,
                    "tokens": totals.tokens,
                    "trained_tokens": totals.trained_tokens,
                    "tokens_per_second": rate or (totals.tokens - tokens_then) / (now - since),
                    "step_seconds": seconds,
                }
            )
            interval = (now, done, totals.tokens)
        return None

    interval = (interval[0], step, totals.tokens)
    if totals.seconds >= seconds_limit and step < total_steps:
        return Outcome(state, BUDGET, step, f"{BUDGET} spent before step {step + 1}")
    while step < total_steps:
        host, fed = feed(state)
        batch = global_batch(host, mesh, rows)
        state, report = step_fn(state, frozen, batch)
        step += 1
        if end := settle():
            return end
        pending = (step, report, fed)
        if time.perf_counter() - started >= seconds_limit and stop.signal is None:
            stop.signal = BUDGET
        evaluating = (eval_every and step % eval_every == 0) or step == total_steps
        saving = (save_every and step % save_every == 0) or step == total_steps
        if evaluating or saving or stop.reached(step):
            if end := settle():
                return end
            result: dict[str, float] = {}
            if evaluating:
                before = time.perf_counter()
                result = hooks.evaluate(state)
                if result:
                    hooks.log({"step": step, **result})
                # Evaluation is not the step's time.
                interval = (interval[0] + time.perf_counter() - before, *interval[1:])
            asked, shut = stop.reached(step), hooks.gate(result)
            if saving or asked or shut:
                hooks.save(step, state, totals, result)
            if shut:
                return Outcome(state, RETENTION, step, shut)
            if asked and step < total_steps:
                return Outcome(state, reason_of(asked), step, asked)
    return Outcome(state, FINISHED, step)
