"""Batches: padded arrays, and an iterator over them that can be continued.

Keys, all [B, T]: `input_ids` int32; `loss_mask` float32, the weight of a token as a target, which
is predicted from the token before it; `segment_ids` int32, 0 for padding and 1, 2, ... within a
row; `positions` int32, from 0 in each segment; with prompt tuning also `virtual` int32, the index
of the prompt slot, and -1 for real tokens and padding. Each segment then begins with its slots.
Keys of preferences and rewards are told in `columns`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from jaxtune.data.columns import DTYPES, segments
from jaxtune.data.token_store import TokenStore

Batch = dict[str, np.ndarray]


class Cursor(NamedTuple):
    """Where in a row the next example goes: its first token, segment, and what is counted on."""

    start: int = 0
    segment: int = 1
    completions: int = 0
    groups: int = 0


def empty_batch(
    batch_size: int, seq_len: int, num_virtual: int = 0, keys: Sequence[str] = ()
) -> Batch:
    """Returns a batch of padding: arrays [B, T] of the keys that every batch has, and of `keys`."""
    shape = (batch_size, seq_len)
    batch = {
        "input_ids": np.zeros(shape, np.int32),
        "loss_mask": np.zeros(shape, np.float32),
        "segment_ids": np.zeros(shape, np.int32),
        "positions": np.zeros(shape, np.int32),
    }
    if num_virtual:
        batch["virtual"] = np.full(shape, -1, np.int32)
    return batch | {key: np.zeros(shape, DTYPES[key]) for key in keys}


def put_segment(
    batch: Batch,
    row: int,
    start: int,
    segment: int,
    ids: np.ndarray,
    mask: np.ndarray,
    num_virtual: int = 0,
) -> int:
    """Writes an example into a row of a batch, in place, and returns where the next one begins.

    Args:
        batch: arrays [B, T] as `empty_batch` makes them.
        row: row of the batch.
        start: first token of the row to write to.
        segment: 1, 2, ... within the row.
        ids: int32 [n].
        mask: float32 [n], 0 for the first token.
        num_virtual: slots before the first token, which positions count.
    """
    first, end = start + num_virtual, start + num_virtual + len(ids)
    batch["input_ids"][row, first:end] = ids
    batch["loss_mask"][row, first:end] = mask
    batch["segment_ids"][row, start:end] = segment
    batch["positions"][row, start:end] = np.arange(end - start)
    if num_virtual:
        batch["virtual"][row, start:first] = np.arange(num_virtual)
    return end


def put_example(
    batch: Batch,
    row: int,
    cursor: Cursor,
    ids: np.ndarray,
    mask: np.ndarray,
    columns: Mapping[str, np.ndarray],
    shared: bool = False,
    num_virtual: int = 0,
) -> Cursor:
    """Writes an example and its columns into a row, in place; returns where the next one goes.

    Args:
        batch: arrays [B, T]; of the columns, those are written that it has.
        row: row of the batch.
        cursor: where the example goes.
        ids: int32 [n].
        mask: float32 [n].
        columns: {name: array [n]}, as `TokenStore.example_columns` gives them.
        shared: whether completions share their prompt; see `columns.segments`.
        num_virtual: slots before each segment.
    """
    start, segment, completions, groups = cursor
    for places, branches, positions in segments(columns.get("branches"), len(ids), shared):
        trained = mask[places]
        end = put_segment(batch, row, start, segment, ids[places], trained, num_virtual)
        here = (row, slice(start + num_virtual, end))
        for name, column in columns.items():
            if name in batch:
                batch[name][here] = column[places]
        for name, before in (("completions", completions), ("groups", groups)):
            if name in batch:
                batch[name][here] += np.where(trained > 0, before, 0).astype(np.int32)
        if branches is not None:
            batch["branches"][here] = branches
            batch["positions"][here] = positions + num_virtual
        start, segment = end, segment + 1
    more = int(columns["completions"].max()) if "completions" in columns else 0
    return Cursor(start, segment, completions + more, groups + 1)


def put_stored(
    batch: Batch, row: int, cursor: Cursor, store: TokenStore, index: int, num_virtual: int = 0
) -> Cursor:
    """Writes an example of a store into a row, in place; returns where the next one goes."""
    ids, mask = store.example(index)
    if not store.keys:
        end = put_segment(batch, row, cursor.start, cursor.segment, ids, mask, num_virtual)
        return cursor._replace(start=end, segment=cursor.segment + 1)
    columns = store.example_columns(index)
    return put_example(batch, row, cursor, ids, mask, columns, store.shared, num_virtual)


def eval_batches(
    store: TokenStore,
    batch_size: int,
    seq_len: int,
    num_virtual: int = 0,
    rows: slice | Sequence[int] = slice(None),
) -> Iterator[Batch]:
    """Yields every example once, in order, one a row; the last batch ends with empty rows.

    Args:
        store: the examples.
        batch_size: rows of the global batch.
        seq_len: T.
        num_virtual: prompt-tuning slots before each segment.
        rows: which rows of each global batch to make.
    """
    for start in range(0, len(store), batch_size):
        chosen = choose(range(start, start + batch_size), rows)
        batch = empty_batch(len(chosen), seq_len, num_virtual, store.keys)
        for row, index in enumerate(chosen):
            if index < len(store):
                put_stored(batch, row, Cursor(), store, index, num_virtual)
        yield batch


def placed_batches(
    store: TokenStore,
    batch_size: int,
    seq_len: int,
    num_virtual: int = 0,
    rows: slice | Sequence[int] = slice(None),
) -> Iterator[tuple[Batch, np.ndarray]]:
    """Yields what `eval_batches` yields, and where each token is in the store's flat arrays.

    So what is computed a token can become a column: `flat[places[places >= 0]] =
    values[places >= 0]`, then `store.with_column(name, flat)`. A token of a prompt that is
    written several times has its place each time.

    Args:
        store, batch_size, seq_len, num_virtual, rows: as for `eval_batches`.

    Yields:
        The batch, and int64 [B, T]: places in 0..total-1, -1 for padding and virtual tokens.
    """
    starts = np.concatenate([[0], np.cumsum(store.lengths)])
    batches = eval_batches(store, batch_size, seq_len, num_virtual, rows)
    for first, batch in zip(range(0, len(store), batch_size), batches, strict=True):
        places = np.full(batch["input_ids"].shape, -1, np.int64)
        for row, index in enumerate(choose(range(first, first + batch_size), rows)):
            if index < len(store):
                size = int(store.lengths[index])
                branches = store.example_columns(index).get("branches")
                cursor = 0
                for part in segments(branches, size, store.shared):
                    own = np.arange(starts[index], starts[index + 1])[part.places]
                    cursor += num_virtual
                    places[row, cursor : cursor + len(own)] = own
                    cursor += len(own)
        yield batch, places


def most_completions(
    stores: Sequence[TokenStore], seq_len: int, packing: bool, num_virtual: int = 0
) -> int:
    """Returns a number that the completions of a row never exceed, at least 1.

    Without packing, the most that an example has. With packing, `seq_len` times the most
    completions a token of room that an example has, rounded down: no row can hold more, whichever
    examples meet in it.
    """
    return _most([store.completions for store in stores], stores, seq_len, packing, num_virtual)


def most_targets(
    stores: Sequence[TokenStore], seq_len: int, packing: bool, num_virtual: int = 0
) -> int:
    """Returns a number that the targets of a row never exceed, at least 1 and at most `seq_len`.

    As `most_completions`.
    """
    most = _most([store.targets for store in stores], stores, seq_len, packing, num_virtual)
    return min(most, seq_len)


def _most(
    numbers: Sequence[np.ndarray],
    stores: Sequence[TokenStore],
    seq_len: int,
    packing: bool,
    num_virtual: int,
) -> int:
    """Returns the bound on a row of what examples have so many of: int [examples] of each store."""
    most = max((int(some.max(initial=0)) for some in numbers), default=0)
    if packing:
        ratios = [
            (some / store.room(num_virtual)).max(initial=0.0)
            for some, store in zip(numbers, stores, strict=True)
        ]
        most = max(most, int(seq_len * max(ratios, default=0.0) + 1e-6))
    return max(most, 1)


def choose(numbers: range, rows: slice | Sequence[int]) -> Sequence[int]:
    """Returns the numbers at the given places."""
    return numbers[rows] if isinstance(rows, slice) else [numbers[row] for row in rows]


class Batches:
    """Iterator over the batches of a run whose position can be saved as JSON and set again.

    Args:
        make: returns the batch of a step; called ahead of need, from several threads.
        total_steps: number of batches of the whole run.
        start: first step.
    """

    def __init__(
        self,
        make: Callable[[int], Batch],
        total_steps: int,
        start: int = 0,
    ) -> None:
        import grain

        dataset = grain.MapDataset.range(total_steps).map(lambda step: make(int(step)))
        # Few and ahead by few: a batch is made in milliseconds, and each one held costs memory.
        options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
        self._dataset = dataset.to_iter_dataset(options)
        self._total = total_steps
        self._iterator = iter(self._dataset)
        self._next = 0
        self.set_state({"next_step": start})

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._next >= self._total:
            raise StopIteration
        batch = next(self._iterator)
        self._next += 1
        return batch

    def get_state(self) -> dict[str, int]:
        """Returns the position: the step whose batch comes next."""
        return {"next_step": self._next}

    def set_state(self, state: dict[str, int]) -> None:
        """Continues at a position that `get_state` gave, of this or of another process."""
        step = int(state["next_step"])
        if not 0 <= step <= self._total:
            raise ValueError(f"step {step} is not in 0..{self._total}")
        if step != self._next:
            self._iterator = iter(self._dataset)
            if step < self._total:
                self._iterator.set_state({"next_index": step})
            self._next = step
