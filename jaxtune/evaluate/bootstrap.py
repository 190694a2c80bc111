"""How sure a difference of two models is: the paired bootstrap over examples."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

DRAWS, LEVEL = 2000, 0.95
_AT_ONCE = 1 << 22  # elements drawn together


class Interval(NamedTuple):
    """A difference and the ends of its confidence interval at LEVEL."""

    difference: float
    low: float
    high: float


def paired(
    ours: np.ndarray, theirs: np.ndarray, weights: np.ndarray, seed: int = 0, draws: int = DRAWS
) -> Interval:
    """Returns the difference of two pooled means, ours − theirs, with its percentile interval.

    The same examples are drawn for both, with replacement (Koehn 2004, W04-3250), so that what
    makes an example hard for both does not widen the interval.

    Args:
        ours, theirs: float [N], each example's sum, such as of the NLL of its tokens.
        weights: float [N], what each sum is divided by, such as its number of tokens.
        seed: of the draws.
        draws: how many.

    >>> paired(np.array([2.0, 4.0]), np.array([1.0, 3.0]), np.array([1.0, 1.0]))
    Interval(difference=1.0, low=1.0, high=1.0)
    """
    gap = np.asarray(ours, np.float64) - np.asarray(theirs, np.float64)
    weights = np.asarray(weights, np.float64)
    rng, count, found = np.random.default_rng(seed), len(gap), []
    for first in range(0, draws, max(1, _AT_ONCE // count)):
        size = min(max(1, _AT_ONCE // count), draws - first)
        chosen = rng.integers(0, count, (size, count))
        whole = weights[chosen].sum(axis=1)
        found.append(gap[chosen].sum(axis=1) / np.where(whole == 0, 1.0, whole))
    ends = np.quantile(np.concatenate(found), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(gap.sum() / weights.sum()), float(ends[0]), float(ends[1]))
