"""Fitting an example into a row: cut, divided into windows, or left out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from jaxtune.data.chat import Rendered
from jaxtune.data.columns import room


def room_of(item: Rendered, shared: bool, num_virtual: int) -> int:
    """Returns how many tokens of a row an example takes, virtual ones included."""
    branches = item.columns.get("branches")
    if branches is None:
        return len(item.ids) + num_virtual
    prompt, sides = int(np.searchsorted(branches, 1)), int(branches[-1])
    size = np.array([len(item.ids)])
    return int(room(size, np.array([prompt]), np.array([sides]), shared, num_virtual)[0])


def positions_of(item: Rendered, num_virtual: int) -> int:
    """Returns how many positions the longest text of an example has, virtual tokens included.

    That is the prompt with the longest of its completions, however many stand in the row.
    """
    branches = item.columns.get("branches")
    if branches is None:
        return len(item.ids) + num_virtual
    sizes = np.bincount(branches)
    return int(sizes[0] + sizes[1:].max()) + num_virtual


def truncated(
    item: Rendered, seq_len: int, context: int, shared: bool, num_virtual: int
) -> Rendered | None:
    """Returns an example without what is too much at its end, or None if no target is left.

    Completions of one prompt lose their ends alike: each keeps at most the same number of tokens,
    the largest with which they fit. Where one is left without a target, or two are left equal,
    nothing is left to compare.

    Args:
        item: the example.
        seq_len: tokens of its row.
        context: positions that each text may have; see `positions_of`.
        shared, num_virtual: as for `room_of`.
    """
    branches = item.columns.get("branches")
    if branches is None:
        item = cut(item, 0, min(seq_len, context) - num_virtual)
        return item if item.mask.any() else None
    sizes = np.bincount(branches)
    prompt, sides = int(sizes[0]), sizes[1:]
    fixed = room_of(item, shared, num_virtual) - int(sides.sum())
    kept = min(_level(sides, seq_len - fixed), context - num_virtual - prompt)
    if kept < 1:
        return None
    starts = np.cumsum(sizes)[:-1]
    ends = starts + np.minimum(sides, kept)
    places = np.concatenate([np.arange(prompt), *map(np.arange, starts, ends)])
    out = take(item, places)
    found = [
        (out.mask[out.columns["branches"] == b], out.ids[out.columns["branches"] == b].tobytes())
        for b in range(1, len(sides) + 1)
    ]
    whole = len({ids for _, ids in found}) == len(found) and all(m.any() for m, _ in found)
    return out if whole else None


def _level(sizes: np.ndarray, most: int) -> int:
    """Returns the largest n for which sum(min(sizes, n)) is at most `most`; -1 if there is none.

    >>> _level(np.array([3, 10]), 9)
    6
    """
    if most < 0:
        return -1
    left, ascending = most, np.sort(sizes)
    for i, size in enumerate(ascending.tolist()):
        if size * (len(sizes) - i) > left:
            return left // (len(sizes) - i)
        left -= size
    return int(ascending[-1])


def cut(item: Rendered, start: int, end: int) -> Rendered:
    """Returns tokens start..end-1 of an example; the first of them is no target."""
    return take(item, slice(start, end))


def windows(item: Rendered, capacity: int) -> Iterator[Rendered]:
    """Yields windows of an example, each with the last token of the one before as context."""
    for start in range(0, len(item.ids) - 1, capacity - 1):
        yield cut(item, start, start + capacity)


def take(item: Rendered, places: np.ndarray | slice) -> Rendered:
    """Returns the tokens of an example at the given places; the first of them is no target."""
    mask = item.mask[places].copy()
    mask[:1] = 0.0
    columns: Mapping[str, np.ndarray] = {n: a[places] for n, a in item.columns.items()}
    return Rendered(item.ids[places], mask, item.roles[places], columns, item.values)
