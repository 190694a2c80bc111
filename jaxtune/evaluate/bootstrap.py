"""How sure a figure is, and the difference of two: the bootstrap over examples."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

DRAWS, LEVEL = 2000, 0.95
_AT_ONCE = 1 << 22  # elements drawn together


class Interval(NamedTuple):
    """A figure and the ends of its confidence interval at LEVEL."""

    value: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class Measured:
    """A figure that follows from sums over examples, so that other draws of them have theirs.

    Attributes:
        sums: float64 [N, S], what each example adds.
        value: sums [R, S] of R draws → their figures [R].
    """

    sums: np.ndarray
    value: Callable[[np.ndarray], np.ndarray]

    @property
    def whole(self) -> float:
        """The figure of all examples."""
        return float(self.value(self.sums.sum(axis=0, keepdims=True))[0])


def mean_of(sums: np.ndarray, weights: np.ndarray | None = None) -> Measured:
    """Returns the pooled mean Σ sums / Σ weights as a Measured; 0 where the weights are 0.

    Args:
        sums: [N], each example's sum, such as of the NLL of its tokens.
        weights: [N], what the sums are divided by, such as the number of tokens; None: 1 each.
    """
    weights = np.ones(len(sums)) if weights is None else weights
    return Measured(np.stack([sums, weights], axis=1).astype(np.float64), _ratio)


def _ratio(sums: np.ndarray) -> np.ndarray:
    return sums[:, 0] / np.where(sums[:, 1] == 0, 1.0, sums[:, 1])


def interval(measured: Measured, seed: int = 0, draws: int = DRAWS) -> Interval:
    """Returns a figure with its percentile interval (Efron 1979), examples drawn anew.

    Args:
        measured: of at least one example.
        seed: of the draws.
        draws: how many.

    >>> interval(mean_of(np.array([1.0, 1.0])))
    Interval(value=1.0, low=1.0, high=1.0)
    """
    found = [measured.value(c @ measured.sums) for c in _counts(len(measured.sums), seed, draws)]
    return Interval(measured.whole, *_ends(np.concatenate(found)))


def paired(ours: Measured, theirs: Measured, seed: int = 0, draws: int = DRAWS) -> Interval:
    """Returns the difference of two figures, ours − theirs, with its percentile interval.

    The same examples are drawn for both, with replacement (Koehn 2004, W04-3250), so that what
    makes an example hard for both does not widen the interval.

    Args:
        ours, theirs: of the same examples.
        seed: of the draws.
        draws: how many.

    >>> paired(mean_of(np.array([2.0, 4.0])), mean_of(np.array([1.0, 3.0])))
    Interval(value=1.0, low=1.0, high=1.0)
    """
    found = [
        ours.value(c @ ours.sums) - theirs.value(c @ theirs.sums)
        for c in _counts(len(ours.sums), seed, draws)
    ]
    return Interval(ours.whole - theirs.whole, *_ends(np.concatenate(found)))


def _counts(count: int, seed: int, draws: int) -> Iterator[np.ndarray]:
    """Yields how often each of `count` examples is in each draw, float64 [some, count]."""
    rng, most = np.random.default_rng(seed), max(1, _AT_ONCE // count)
    for first in range(0, draws, most):
        size = min(most, draws - first)
        chosen = rng.integers(0, count, (size, count)) + np.arange(size)[:, None] * count
        found = np.bincount(chosen.ravel(), minlength=size * count)
        yield found.reshape(size, count).astype(np.float64)


def _ends(values: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
