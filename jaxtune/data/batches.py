"""Batches: padded arrays, and an iterator over them that can be continued.

Keys, all [B, T]: `input_ids` int32; `loss_mask` float32, the weight of a token as a target, which
is predicted from the token before it; `segment_ids` int32, 0 for padding and 1, 2, ... within a
row; `positions` int32, from 0 in each segment; with prompt tuning also `virtual` int32, the index
of the prompt slot, and -1 for real tokens and padding. Each segment then begins with its slots.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from jaxtune.data.store import TokenStore

Batch = dict[str, np.ndarray]


def empty_batch(batch_size: int, seq_len: int, num_virtual: int = 0) -> Batch:
    """Returns a batch of padding: arrays [B, T] of the keys that every batch has."""
    shape = (batch_size, seq_len)
    batch = {
        "input_ids": np.zeros(shape, np.int32),
        "loss_mask": np.zeros(shape, np.float32),
        "segment_ids": np.zeros(shape, np.int32),
        "positions": np.zeros(shape, np.int32),
    }
    if num_virtual:
        batch["virtual"] = np.full(shape, -1, np.int32)
    return batch


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
        seq_len: tokens a row, virtual tokens included.
        num_virtual: prompt-tuning slots before each example.
        rows: which rows of each global batch to make.
    """
    for start in range(0, len(store), batch_size):
        chosen = choose(range(start, start + batch_size), rows)
        batch = empty_batch(len(chosen), seq_len, num_virtual)
        for row, index in enumerate(chosen):
            if index < len(store):
                put_segment(batch, row, 0, 1, *store.example(index), num_virtual)
        yield batch


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
