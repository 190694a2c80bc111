"""Rows that say the same, or nearly: within a split, and across splits; and answers that differ."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from jaxtune.data.doctor.minhash import SIZE, estimate

# Rows that share a band are compared with this many that follow in order of the next bands, so
# that a bucket of thousands costs no square; near duplicates stand beside each other there.
_WINDOW = 8
_DEVIATIONS = 3.6  # of the estimate, below which a pair is not compared
_BLOCK = 1 << 17


@dataclass(frozen=True)
class Same:
    """Rows and the row that each repeats, int64 [found] both; numbers are of all inputs' rows."""

    rows: np.ndarray
    of: np.ndarray


@dataclass(frozen=True)
class Pairs:
    """Similar rows.

    Attributes:
        left, right: int64 [pairs]; left < right.
        similarity: float [pairs].
    """

    left: np.ndarray
    right: np.ndarray
    similarity: np.ndarray


def exact(hashes: np.ndarray, split: np.ndarray) -> tuple[Same, Same, np.ndarray]:
    """Finds equal hashes.

    Args:
        hashes: uint64 [rows]; 0 is equal to nothing.
        split: int [rows].

    Returns:
        Rows that repeat an earlier one of their split; rows that a later split has too, with the
        row there; and the rows that are the first of their hash, int64, ascending.
    """
    known = np.flatnonzero(hashes)
    order = known[np.lexsort((known, split[known], hashes[known]))]
    keys, parts = hashes[order], split[order]
    new_key = np.ones(len(order), bool)
    new_key[1:] = keys[1:] != keys[:-1]
    new_part = new_key.copy()
    new_part[1:] |= parts[1:] != parts[:-1]
    part_starts = np.flatnonzero(new_part)
    part_of = np.cumsum(new_part) - 1
    first_of_part = order[part_starts][part_of] if len(order) else order
    again = ~new_part
    # A part leaks where the next part has the same key.
    leaks = np.zeros(len(part_starts), bool)
    leaks[:-1] = ~new_key[part_starts[1:]]
    following = np.append(order[part_starts[1:]], -1) if len(order) else order
    leaking = leaks[part_of] if len(order) else again
    repeats = Same(order[again], first_of_part[again])
    shared = Same(order[leaking], following[part_of[leaking]] if len(order) else order)
    return repeats, shared, np.sort(order[new_key])


def candidates(bands: np.ndarray, low: np.ndarray, rows: np.ndarray, near: float) -> np.ndarray:
    """Returns int64 [pairs, 2] of rows that share a band and whose signatures are near.

    Args:
        bands: uint32 [all rows, bands].
        low: uint8 [all rows, SIZE].
        rows: int64, those to compare, ascending.
        near: similarity.
    """
    size = np.uint64(max(len(rows), 1))
    found = np.zeros(0, np.uint64)
    count = bands.shape[1]
    least = near - _DEVIATIONS * (near * (1 - near) / SIZE) ** 0.5
    columns = [np.ascontiguousarray(bands[rows, band]) for band in range(count)]
    for band in range(count):
        keys = columns[band]
        order = np.lexsort((columns[(band + 2) % count], columns[(band + 1) % count], keys))
        keys = keys[order]
        for step in range(1, _WINDOW + 1):
            same = np.flatnonzero(keys[step:] == keys[:-step])
            if not len(same):
                break
            one, two = order[same], order[same + step]
            low_row, high_row = np.minimum(one, two), np.maximum(one, two)
            found = np.union1d(found, low_row.astype(np.uint64) * size + high_row.astype(np.uint64))
    kept = []
    for start in range(0, len(found), _BLOCK):
        left, right = np.divmod(found[start : start + _BLOCK], size)
        pair = np.stack([rows[left.astype(np.int64)], rows[right.astype(np.int64)]], axis=1)
        kept.append(pair[estimate(low[pair[:, 0]], low[pair[:, 1]]) >= least])
    return np.concatenate(kept) if kept else np.zeros((0, 2), np.int64)


def blocks(pairs: np.ndarray, most: int = 256) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields blocks of pairs as (rows, ascending; int [block, 2] places in them)."""
    for start in range(0, len(pairs), most):
        rows, places = np.unique(pairs[start : start + most], return_inverse=True)
        yield rows, places.reshape(-1, 2)


def near(pairs: Pairs, split: np.ndarray) -> tuple[Same, Same, np.ndarray]:
    """Says which row of each pair repeats the other.

    Returns:
        As `exact`: rows that are near an earlier row of their split, each once, with the most
        similar; rows near one of a later split; and the rows to remove so that no two of a split
        that are left are near.
    """
    left_split, right_split = split[pairs.left], split[pairs.right]
    inside = left_split == right_split
    repeats = _most_similar(pairs.right[inside], pairs.left[inside], pairs.similarity[inside])
    across = ~inside
    flip = (left_split > right_split)[across]
    one, two = pairs.left[across], pairs.right[across]
    trained, held = np.where(flip, two, one), np.where(flip, one, two)
    leaks = _most_similar(trained, held, pairs.similarity[across])
    removed: set[int] = set()
    earlier = pairs.left[inside]
    later = pairs.right[inside]
    for at in np.lexsort((earlier, later)):
        if int(earlier[at]) not in removed:
            removed.add(int(later[at]))
    return repeats, leaks, np.array(sorted(removed), np.int64)


def _most_similar(rows: np.ndarray, of: np.ndarray, similarity: np.ndarray) -> Same:
    order = np.lexsort((of, -similarity, rows))
    rows, of = rows[order], of[order]
    first = np.ones(len(rows), bool)
    first[1:] = rows[1:] != rows[:-1]
    return Same(rows[first], of[first])


def conflicts(prompt: np.ndarray, answer: np.ndarray) -> Same:
    """Finds rows whose prompt another row answers otherwise.

    Args:
        prompt, answer: uint64 [rows] hashes; 0 where there is none.

    Returns:
        All such rows, ascending, each with a row of another answer.
    """
    known = np.flatnonzero(prompt)
    order = known[np.lexsort((known, prompt[known]))]
    keys, said = prompt[order], answer[order]
    if not len(order):
        return Same(order, order)
    new = np.ones(len(order), bool)
    new[1:] = keys[1:] != keys[:-1]
    starts, group = np.flatnonzero(new), np.cumsum(new) - 1
    first = order[starts][group]
    other = said != said[starts][group]
    # The first row of the group that differs from its first answer.
    differing = np.full(len(starts), -1, np.int64)
    at = np.flatnonzero(other)[::-1]
    differing[group[at]] = order[at]
    clash = differing[group] >= 0
    of = np.where(other, first, differing[group])
    rows, of = order[clash], of[clash]
    ascending = np.argsort(rows)
    return Same(rows[ascending], of[ascending])
