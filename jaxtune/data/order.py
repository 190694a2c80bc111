"""The endless order in which examples are read: shuffled anew each pass, mixed by weight."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache

import numpy as np

# Weights become integers that sum to at most about this, so that positions up to 9e12 stay exact
# in int64. Weights with few digits keep their proportion exactly, others to one part in a million.
_WEIGHT_SCALE = 1_000_000


class Order:
    """Random access to an endless sequence of examples, numbered through all sources.

    Position p is taken from source k such that, after any number of positions, each source has had
    its share of them to within one example or so a source; a source that has been read through
    starts again in a new order. (Grain's mixing does the same; its shuffle needs up to
    milliseconds for each index of a source of few examples, so the order is made here, a whole
    pass at a time.)

    Args:
        sizes: examples of each source.
        weights: proportion in which each source is sampled; need not sum to 1.
        shuffle: whether each pass has an order of its own; else the sources' order is kept.
        seed: of the shuffle.
    """

    def __init__(
        self, sizes: Sequence[int], weights: Sequence[float], *, shuffle: bool, seed: int
    ) -> None:
        if len(sizes) != len(weights) or not sizes:
            raise ValueError(f"{len(sizes)} sizes and {len(weights)} weights")
        if min(sizes) < 1 or not all(0 < w < float("inf") for w in weights):
            raise ValueError("sizes and weights must be positive")
        self.sizes = np.array(sizes, np.int64)
        self.bases = np.concatenate([[0], np.cumsum(self.sizes)])
        self._proportions = _integers(weights)
        self._shuffle, self._seed = shuffle, seed
        self._pass = lru_cache(maxsize=2 * len(sizes))(self._make_pass)
        self.epoch = self._epoch()

    def counts(self, positions: np.ndarray | int) -> np.ndarray:
        """Returns how many of the first `positions` are each source's.

        Args:
            positions: int, any shape [...].

        Returns:
            int64 [sources, ...].
        """
        current = np.asarray(positions, np.int64)
        remaining = int(self._proportions.sum())
        out = []
        for proportion in self._proportions.tolist():
            following = current * (remaining - proportion) // remaining
            out.append(current - following)
            current, remaining = following, remaining - proportion
        return np.stack(out)

    def examples(self, start: int, stop: int) -> np.ndarray:
        """Returns the examples at positions start..stop-1, int64 [stop - start].

        Example i of source k has number `bases[k] + i`.
        """
        before = self.counts(np.arange(start, stop + 1))
        out = np.empty(stop - start, np.int64)
        for source in range(len(self.sizes)):
            taken = np.flatnonzero(np.diff(before[source]))
            if len(taken):
                out[taken] = self.bases[source] + self._nth(source, before[source][taken])
        return out

    def _nth(self, source: int, index: np.ndarray) -> np.ndarray:
        size = int(self.sizes[source])
        if not self._shuffle:
            return index % size
        passes = index // size
        out = np.empty(len(index), np.int64)
        for number in range(int(passes[0]), int(passes[-1]) + 1):
            here = passes == number
            out[here] = self._pass(source, number)[index[here] % size]
        return out

    def _make_pass(self, source: int, number: int) -> np.ndarray:
        key = int.from_bytes(
            hashlib.blake2b(f"{self._seed}/{source}/{number}".encode(), digest_size=16).digest(),
            "little",
        )
        # NumPy promises the raw bits of a bit generator for ever, but not what permutation() does.
        bits = np.random.Philox(key=key).random_raw(int(self.sizes[source]))
        return np.argsort(bits, kind="stable")

    def _epoch(self) -> int:
        """Finds the smallest number of positions in which every example occurs."""
        low, high = 0, int(self.sizes.max())
        while (self.counts(high) < self.sizes).any():
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            if (self.counts(middle) < self.sizes).any():
                low = middle
            else:
                high = middle
        return high


def _integers(weights: Sequence[float]) -> np.ndarray:
    """Returns integers int64 [sources] in the proportion of the weights.

    >>> _integers([0.75, 0.25]).tolist()
    [3, 1]
    """
    exact = [Fraction(str(float(w))) for w in weights]  # the decimal that the user wrote
    scale = math.lcm(*(w.denominator for w in exact))
    whole = [int(w * scale) for w in exact]
    common = math.gcd(*whole)
    if sum(whole) // common <= _WEIGHT_SCALE:
        return np.array([w // common for w in whole], np.int64)
    scaled = np.array(weights, np.float64) / np.sum(weights) * _WEIGHT_SCALE
    return np.maximum(1, np.rint(scaled)).astype(np.int64)
