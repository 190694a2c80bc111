"""Samples → the scores of every reward, and their weighted sum."""

from __future__ import annotations

import math
import numbers
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from jaxtune.rl.rewards.calls import Hung, call
from jaxtune.rl.rewards.reward import Reward, keywords


class _Misshapen(Exception):
    """What a function returned is not a list as long as the batch."""


class RewardError(RuntimeError):
    """A reward failed, and the config says that the run is to stop."""


@dataclass(frozen=True)
class _Fault:
    """Samples [k] that a reward failed on, what happened on the first, and what it raised."""

    samples: tuple[int, ...]
    why: str
    error: BaseException | None = None
    whole: bool = False


@dataclass(frozen=True)
class Scores:
    """What a batch of n samples was given.

    Attributes:
        by_function: {name of the reward: float64 [n]}, before weighting; NaN: no score.
        total: float64 [n], the sum of weight × score over the rewards that gave one; 0 where
            `dropped`.
        dropped: bool [n], samples to be left out: a reward failed on them, or none gave a score.
        faults: one line for each reward that failed, naming it and the first sample.
    """

    by_function: dict[str, np.ndarray]
    total: np.ndarray
    dropped: np.ndarray
    faults: tuple[str, ...] = ()


def score(
    rewards: Sequence[Reward],
    prompts: Sequence[str],
    completions: Sequence[str],
    columns: Mapping[str, Sequence],
    *,
    completion_ids: Sequence[Sequence[int]] | None = None,
    finished: Sequence[bool] | None = None,
    places: Sequence[str] | None = None,
) -> Scores:
    """Calls every reward once, in their order, on all samples.

    A reward that returns None for a sample has no opinion of it, which is no failure. It fails on
    a sample where it gives NaN, an infinity or no number; on the batch where it does not return
    in time or returns another length. Where it raises, it is called again with each sample alone,
    to find those to blame; if none is, it failed on the batch.

    Args:
        rewards: of the run.
        prompts: [n], as text.
        completions: [n], as text without the prompt.
        columns: {field of the prompt records: [n]}.
        completion_ids: [n] lists of tokens, for functions that name them.
        finished: [n], whether a completion ended by itself; for functions that name it.
        places: [n], where each prompt stands in the data, for messages.

    Raises:
        RewardError: a reward with on_error = "stop" failed; the message names it, the sample's
            index and its prompt's place.
    """
    n = len(completions)
    asked = {"completion_ids": completion_ids, "finished": finished}
    given = {
        "prompts": list(prompts),
        "completions": list(completions),
        **{name: list(values) for name, values in columns.items()},
        **{name: list(values) for name, values in asked.items() if values is not None},
    }
    uneven = {name: len(values) for name, values in given.items() if len(values) != n}
    if uneven:
        raise ValueError(f"{n} completions, but {uneven}")
    by_function, faults = {}, []
    total, failed, scored = np.zeros(n), np.zeros(n, bool), np.zeros(n, bool)
    for reward in rewards:
        values, fault = _judge(reward, given, n)
        if fault is not None:
            line = _line(reward, fault, places)
            if reward.on_error == "stop":
                raise RewardError(line) from fault.error
            faults.append(line)
            failed[list(fault.samples)] = True
        by_function[reward.name] = values
        has = ~np.isnan(values)
        total[has] += reward.weight * values[has]
        scored |= has
    dropped = failed | ~scored
    total[dropped] = 0.0
    return Scores(by_function, total, dropped, tuple(faults))


def _judge(reward: Reward, given: Mapping[str, list], n: int) -> tuple[np.ndarray, _Fault | None]:
    """Returns (float64 [n], NaN: no score; what went wrong, if anything)."""
    if n == 0:
        return np.zeros(0), None
    try:
        values = call(lambda: _call(reward, given), reward.timeout, reward.name)
        return _numbers(values)
    except (Hung, _Misshapen) as error:
        return np.full(n, math.nan), _Fault(tuple(range(n)), str(error), whole=True)
    except Exception as error:
        return _one_by_one(reward, given, n, error)


def _call(reward: Reward, given: Mapping[str, list]) -> list:
    """Returns what the function gives, as a list that is as long as the batch."""
    # Each call gets lists of its own: a function that changes one does not change the others'.
    values = reward.function(
        list(given["prompts"]), list(given["completions"]), **keywords(reward, given)
    )
    if hasattr(values, "tolist"):  # an array of NumPy, JAX or torch
        values = values.tolist()
    n = len(given["completions"])
    if not isinstance(values, list | tuple):
        raise _Misshapen(f"returned {type(values).__name__}, not a list of numbers")
    if len(values) != n:
        raise _Misshapen(f"returned {len(values)} scores for {n} completions")
    return list(values)


def _numbers(values: list) -> tuple[np.ndarray, _Fault | None]:
    out, bad = np.full(len(values), math.nan), []
    for i, value in enumerate(values):
        if isinstance(value, numbers.Real | np.bool_) and math.isfinite(value):
            out[i] = float(value)
        elif value is not None:
            bad.append(i)
    return out, _Fault(tuple(bad), f"gave {values[bad[0]]!r:.80}") if bad else None


def _one_by_one(
    reward: Reward, given: Mapping[str, list], n: int, error: Exception
) -> tuple[np.ndarray, _Fault | None]:
    """Finds the samples on which a function that raised is to blame."""
    out, bad, first = np.full(n, math.nan), [], None
    for i in range(n if n > 1 else 0):
        alone = {name: values[i : i + 1] for name, values in given.items()}
        try:
            values, fault = _numbers(
                call(lambda alone=alone: _call(reward, alone), reward.timeout, reward.name)
            )
            out[i] = values[0]
        except Hung as hung:  # the rest would take the same time again, each
            bad += range(i, n)
            first = first or _Fault((0,), str(hung))
            break
        except Exception as again:
            fault = _Fault((0,), _raised(again), again)
        if fault is not None:
            bad.append(i)
            first = first or fault
    if first is None:
        return np.full(n, math.nan), _Fault(tuple(range(n)), _raised(error), error, whole=n > 1)
    return out, _Fault(tuple(bad), first.why, first.error)


def _raised(error: Exception) -> str:
    steps = traceback.extract_tb(error.__traceback__)
    at = f" ({steps[-1].filename}:{steps[-1].lineno})" if steps else ""
    return f"raised {type(error).__name__}: {error!s:.300}{at}"


def _line(reward: Reward, fault: _Fault, places: Sequence[str] | None) -> str:
    samples = f"{len(fault.samples)} samples"
    if not fault.whole:
        first = fault.samples[0]
        samples = f"sample {first}" if len(fault.samples) == 1 else f"{samples}, first {first}"
    # Of a whole batch the first place tells where to look.
    place = "" if places is None else f" ({places[fault.samples[0]]})"
    return f"reward {reward.name} {fault.why}; {samples}{place}"
