"""The outer loop of reinforcement learning, as a feed of the one training loop.

An iteration samples completions of some prompts with the weights that the state has, scores them,
and is used for a few passes of minibatches:

    step s  →  iteration s // steps,  minibatch s % steps,  steps = epochs · rows / batch_size

Nothing is sampled before its first step asks for it, so a run stops and continues at any step; the
rows of the iteration under way are saved with the checkpoint.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxtune.data.batches import Batch
from jaxtune.rl.groups import Group
from jaxtune.rl.mismatch import mismatch
from jaxtune.training.state import TrainState

HELD, TOLD, CARRIED = "rows", "metrics", "carried"  # in a checkpoint: HELD/input_ids, …


class SamplerMismatch(RuntimeError):
    """The sampler's log-probabilities are not the trainer's: it samples from another policy."""


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How an iteration becomes steps.

    Attributes:
        rows: of an iteration, N.
        batch_size: rows of a step, which divides N.
        epochs: passes over the rows.
        seed: of their order.
    """

    rows: int
    batch_size: int
    epochs: int
    seed: int

    @property
    def steps(self) -> int:
        """Steps of an iteration."""
        return self.epochs * self.rows // self.batch_size

    def rows_at(self, iteration: int, step: int) -> np.ndarray:
        """Returns the rows of the step-th minibatch of an iteration, int [batch_size].

        >>> Schedule(4, 2, 2, 0).rows_at(0, 1).shape
        (2,)
        """
        epoch, part = divmod(step, self.rows // self.batch_size)
        order = np.random.default_rng([self.seed, iteration, epoch]).permutation(self.rows)
        return order[part * self.batch_size : (part + 1) * self.batch_size]


@dataclasses.dataclass(frozen=True)
class Iteration:
    """The rollouts of an iteration.

    Attributes:
        rows: arrays [N, T], the batch's keys.
        metrics: what is told of them with each of their steps.
        carried: {name: number} that the next iteration starts from.
        groups: for `note`.
    """

    rows: Batch
    metrics: dict[str, float]
    carried: dict[str, float]
    groups: Sequence[Group] = ()


# (state, iteration, carried) → its rollouts, a function of the weights, the seed and these
Roll = Callable[[TrainState, int, Mapping[str, float]], Iteration]


class Rollouts:
    """A `training.feed.Feed` whose batches are rollouts of the state's policy.

    Args:
        schedule: of steps.
        roll: makes an iteration.
        step: steps done.
        carried: what the first iteration starts from, such as the KL coefficient.
        saved: what `arrays` returned at that step; empty at the start.
        held: which rows of each batch this process has; all by default.
        note: gets (step, iteration number, Iteration) of each new one.
    """

    def __init__(
        self,
        schedule: Schedule,
        roll: Roll,
        *,
        step: int,
        carried: Mapping[str, float],
        saved: Mapping[str, np.ndarray],
        held: Sequence[int] | slice = slice(None),
        note: Callable[[int, int, Iteration], None] = lambda *_: None,
    ) -> None:
        self._schedule, self._roll, self._held, self._note = schedule, roll, held, note
        self._step, self._carried = step, dict(carried)
        self._current: Iteration | None = None
        self._trained_since: float | None = None
        if saved:
            self._carried = {k: float(v) for k, v in _restored(CARRIED, saved).items()}
            told = {k: float(v) for k, v in _restored(TOLD, saved).items()}
            if rows := _restored(HELD, saved):
                self._current = Iteration(rows, told, self._carried)

    def feed(self, state: TrainState) -> tuple[Batch, dict[str, float]]:
        """Returns the next minibatch and the metrics of its iteration."""
        number, step = divmod(self._step, self._schedule.steps)
        if step == 0 or self._current is None:
            self._begin(state, number)
        rows = self._schedule.rows_at(number, step)[self._held]
        self._step += 1
        batch = {name: array[rows] for name, array in self._current.rows.items()}
        return batch, self._current.metrics

    def _begin(self, state: TrainState, number: int) -> None:
        jax.block_until_ready(state.trainable)  # else its time would count as sampling
        started = time.perf_counter()
        times = {}
        if self._trained_since is not None:
            times["training_seconds"] = started - self._trained_since
        new = self._roll(state, number, self._carried)
        self._trained_since = time.perf_counter()
        times["sampling_seconds"] = self._trained_since - started
        # In a checkpoint they are float32, and a continued run logs the same numbers.
        told = {k: float(np.float32(v)) for k, v in (new.metrics | times).items()}
        self._carried = {k: float(np.float32(v)) for k, v in new.carried.items()}
        self._current = dataclasses.replace(new, metrics={"iteration": float(number), **told})
        self._note(self._step, number, self._current)

    def arrays(self) -> dict[str, np.ndarray]:
        """Returns what continues from here: see `training.feed.Source`."""
        kept = _saved(CARRIED, {k: np.float32(v) for k, v in self._carried.items()})
        if self._current is None or self._step % self._schedule.steps == 0:
            return kept
        told = {k: np.float32(v) for k, v in self._current.metrics.items()}
        return kept | _saved(TOLD, told) | _saved(HELD, self._current.rows)


def _saved(part: str, values: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Returns {path: array} of a part of a checkpoint; a `/` in a name is no level of its own."""
    return {f"{part}/{name.replace('/', ':')}": np.asarray(x) for name, x in values.items()}


def _restored(part: str, saved: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns what `_saved` was given."""
    start = f"{part}/"
    found = {path.removeprefix(start): x for path, x in saved.items() if path.startswith(start)}
    return {name.replace(":", "/"): x for name, x in found.items()}


def sampler_gap(
    sampled: np.ndarray, trained: np.ndarray, inside: np.ndarray, limit: float
) -> dict[str, float]:
    """Returns how far two log-probabilities are apart: see `mismatch`, whose mean is `sampler_gap`.

    The mean is what is bounded: in bfloat16 single tokens differ by more without any fault.

    Args:
        sampled: float32 [N, T], of the sampler.
        trained: float32 [N, T], of the trainer, on the same tokens with the same weights.
        inside: bool [N, T], sampled tokens.
        limit: of the mean, nats a token.

    Raises:
        SamplerMismatch: past the limit (CORRECTNESS C18, C25).
    """
    if not inside.any():
        return {"sampler_gap": 0.0, "sampler_gap/max": 0.0, "sampler_gap/k3": 0.0}
    found = mismatch(sampled, trained, inside)
    mean = found["mean"]
    # Where the trainer's are not finite, the loss is not either, and the loop says which step.
    if np.isfinite(trained[inside]).all() and not mean <= limit:
        ours, its = float(trained[inside].mean()), float(sampled[inside].mean())
        raise SamplerMismatch(
            f"the sampler gives its tokens log-probabilities of {its:.4f} nats on average and the "
            f"trainer {ours:.4f} with the same weights: {mean:.4f} nats a token apart, more than "
            f"objective.max_logprob_gap = {limit:g}; the sampler has other weights, another "
            "temperature or a lower precision"
        )
    return {"sampler_gap": mean, "sampler_gap/max": found["max"], "sampler_gap/k3": found["k3"]}
