"""Packing: several examples in a row, each whole, with little room left over."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np


def pack(
    lengths: Sequence[int] | np.ndarray, capacity: int, seed: int, window: int = 2048
) -> list[np.ndarray]:
    """Puts each example into exactly one row, best fit decreasing within windows of the order.

    Windows keep a row's examples close in the (shuffled) order and the work near-linear; the rows
    themselves are shuffled at the end, since best fit makes first the rows of long examples.

    Args:
        lengths: int [N], in the order in which the examples are read.
        capacity: the most that the lengths in a row may sum to.
        seed: of the order of rows.
        window: examples packed together.

    Returns:
        Rows: int64 arrays of indices into `lengths`, ascending within a row.

    Raises:
        ValueError: an example is longer than `capacity`, or has no length.

    >>> [row.tolist() for row in pack([5, 3, 4, 2], capacity=8, seed=0)]
    [[0, 1], [2, 3]]
    """
    lengths = np.asarray(lengths, np.int64)
    if len(lengths) and (lengths.max() > capacity or lengths.min() < 1):
        raise ValueError(f"lengths must be in 1..{capacity}")
    rows: list[list[int]] = []
    for start in range(0, len(lengths), window):
        rows += _best_fit(lengths[start : start + window], start, capacity)
    bits = np.random.Philox(key=seed % 2**64).random_raw(len(rows))
    return [np.sort(np.array(rows[i], np.int64)) for i in np.argsort(bits, kind="stable")]


def _best_fit(lengths: np.ndarray, start: int, capacity: int) -> list[list[int]]:
    rows: list[list[int]] = []
    open_rows: list[tuple[int, int]] = []  # (room left, row), sorted
    for index in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[index])
        best = bisect_left(open_rows, (length, -1))
        if best < len(open_rows):
            room, row = open_rows.pop(best)
        else:
            room, row = capacity, len(rows)
            rows.append([])
        rows[row].append(start + index)
        if room > length:
            insort(open_rows, (room - length, row))
    return rows
