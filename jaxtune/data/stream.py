"""The rows of a run: which examples each one holds, without end and at random access."""

from __future__ import annotations

import hashlib
import json
import math
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxtune.core.errors import RequestError
from jaxtune.data.batches import (
    Batch,
    Batches,
    Cursor,
    choose,
    empty_batch,
    most_completions,
    most_targets,
    put_stored,
)
from jaxtune.data.order import Order
from jaxtune.data.packing import pack
from jaxtune.data.token_store import TokenStore

# Rows are planned for at most so many examples at once, so that an epoch of any length can begin.
_BLOCK = 1 << 18
_KEPT_PLANS = 4
# A run of more is a slip of the pen, and planning its rows would take hours.
_MOST_EPOCHS = 100_000


@dataclass(frozen=True)
class Budget:
    """How long a run is.

    Attributes:
        steps: number of batches.
        rows: number of rows that hold data, if the last batch is to end before it is full.
    """

    steps: int
    rows: int | None = None


@dataclass(frozen=True)
class _Plan:
    """Rows of a block of positions: row r holds examples[starts[r]:starts[r + 1]]."""

    examples: np.ndarray
    starts: np.ndarray


class Stream:
    """The rows of a run: endless, random access, the same for every host and batch slicing.

    An epoch is the smallest number of examples in which each example of each source is seen: with
    one source, each exactly once. In a mixture, the sources that their weight makes run out sooner
    begin again within the epoch, each time in a new order.

    Args:
        stores: tokenised sources.
        weights: proportion in which examples of each source are drawn.
        seq_len: tokens a row, virtual tokens included.
        packing: puts several examples into a row.
        shuffle: gives each pass over a source an order of its own.
        seed: of every shuffle.
        num_virtual: prompt-tuning slots before each segment.

    Attributes:
        keys: names of the batch keys beside those of every batch.
    """

    def __init__(
        self,
        stores: Sequence[TokenStore],
        weights: Sequence[float] | None = None,
        *,
        seq_len: int,
        packing: bool = False,
        shuffle: bool = True,
        seed: int = 0,
        num_virtual: int = 0,
    ) -> None:
        self.stores = tuple(stores)
        self.weights = tuple(weights) if weights is not None else (1.0,) * len(self.stores)
        self.seq_len, self.num_virtual = seq_len, num_virtual
        self.packing, self.shuffle, self.seed = packing, shuffle, seed
        sizes = [len(store) for store in self.stores]
        self._order = Order(sizes, self.weights, shuffle=shuffle, seed=seed)
        self.keys = tuple(dict.fromkeys(key for store in self.stores for key in store.keys))
        self._lengths = np.concatenate([store.room(num_virtual) for store in self.stores])
        self._virtual = num_virtual * np.concatenate(
            [np.ones(len(s), np.int64) if s.shared else s.sides for s in self.stores]
        )
        if self._lengths.max() > seq_len:
            raise ValueError(f"an example needs {self._lengths.max()} tokens of {seq_len}")
        self._blocks = -(-self._order.epoch // _BLOCK)
        self._plans: OrderedDict[int, _Plan] = OrderedDict()
        self._first_rows = [0]  # first row of each block known so far
        self._lock = threading.RLock()  # batches are made by prefetching threads

    @property
    def examples_per_epoch(self) -> int:
        """Number of examples in an epoch."""
        return self._order.epoch

    def rows_per_epoch(self, epoch: int) -> int:
        """Returns the number of rows of an epoch; with packing and shuffling they differ."""
        first = epoch * self._blocks
        return self._first_row(first + self._blocks) - self._first_row(first)

    @property
    def most_completions(self) -> int:
        """A number that the completions of a row never exceed; see `batches.most_completions`."""
        return most_completions(self.stores, self.seq_len, self.packing, self.num_virtual)

    @property
    def most_targets(self) -> int:
        """A number that the targets of a row never exceed; see `batches.most_targets`."""
        return most_targets(self.stores, self.seq_len, self.packing, self.num_virtual)

    def empty_batch(self, batch_size: int) -> Batch:
        """Returns rows of padding, arrays [B, T] of the keys that its batches have."""
        return empty_batch(batch_size, self.seq_len, self.num_virtual, self.keys)

    def with_column(self, name: str, flats: Sequence[np.ndarray]) -> Stream:
        """Returns the same rows with one more batch key.

        Args:
            name: of the key, in `columns.DTYPES`.
            flats: of each store, float32 [its tokens]; see `TokenStore.with_column`.
        """
        stores = [s.with_column(name, flat) for s, flat in zip(self.stores, flats, strict=True)]
        return Stream(
            stores,
            self.weights,
            seq_len=self.seq_len,
            packing=self.packing,
            shuffle=self.shuffle,
            seed=self.seed,
            num_virtual=self.num_virtual,
        )

    def row(self, index: int) -> Batch:
        """Returns row `index` of the endless stream, arrays [T]."""
        row = self.empty_batch(1)
        self._fill(row, 0, index)
        return {name: array[0] for name, array in row.items()}

    def examples_of_row(self, index: int) -> list[tuple[int, int]]:
        """Returns (store, example) of each segment of a row."""
        numbers = self._examples(index)
        stores = np.searchsorted(self._order.bases, numbers, side="right") - 1
        return [
            (int(s), int(n - self._order.bases[s])) for s, n in zip(stores, numbers, strict=True)
        ]

    def budget(
        self,
        *,
        batch_size: int,
        total_steps: int | None = None,
        total_epochs: float | None = None,
        total_examples: int | None = None,
        total_tokens: int | None = None,
    ) -> Budget:
        """Turns exactly one of the durations into a number of steps.

        Epochs and examples end exactly, if need be with a last batch that is not full; packed rows
        are whole, so that the last may go beyond `total_examples`. Tokens (real ones: neither
        padding nor virtual) end with the batch in which the number is reached.

        Raises:
            RequestError: not exactly one duration is given, or it is not positive.
        """
        given = {
            "total_steps": total_steps,
            "total_epochs": total_epochs,
            "total_examples": total_examples,
            "total_tokens": total_tokens,
        }
        given = {name: value for name, value in given.items() if value is not None}
        if len(given) != 1:
            names = "total_steps, total_epochs, total_examples, total_tokens"
            raise RequestError(f"give exactly one of {names}, not {len(given)}")
        ((name, amount),) = given.items()
        if not (amount > 0 and math.isfinite(amount)):
            raise RequestError(f"{amount} is not positive", key=name)
        if name == "total_steps":
            return Budget(int(amount))
        each = {"total_epochs": 1, "total_examples": self._order.epoch}
        if amount / each.get(name, self._order.epoch * self.seq_len) > _MOST_EPOCHS:
            raise RequestError(f"{amount} is more than {_MOST_EPOCHS} epochs of the data", key=name)
        if name == "total_epochs":
            whole, part = divmod(amount, 1)
            rows = self._first_row(int(whole) * self._blocks)
            # The small number forgives 0.1 * 30 = 3.0000000000000004 rows.
            rows += math.ceil(part * self.rows_per_epoch(int(whole)) - 1e-9) if part else 0
        else:
            rows = self._rows_holding(math.ceil(amount), tokens=name == "total_tokens")
        rows = max(rows, 1)
        steps = -(-rows // batch_size)
        if steps >= 2**31:
            raise RequestError(f"{amount} is {steps} steps, more than 2147483647", key=name)
        return Budget(steps, None if name == "total_tokens" else rows)

    def steps(self, *, batch_size: int, **duration: Any) -> int:
        """Returns the number of batches of a duration; see `budget`."""
        return self.budget(batch_size=batch_size, **duration).steps

    def batches(
        self,
        batch_size: int,
        total_steps: int,
        start: int = 0,
        rows: slice | Sequence[int] = slice(None),
        row_limit: int | None = None,
    ) -> Batches:
        """Returns an iterator over batches start..total_steps-1, made ahead by Grain.

        Args:
            batch_size: rows of the global batch.
            total_steps: number of batches of the whole run.
            start: first batch.
            rows: which rows of each global batch to make; a host asks for its own.
            row_limit: rows of the whole run that hold data (`Budget.rows`); later ones are empty.
        """
        return Batches(
            lambda step: self.batch(step, batch_size, rows, row_limit), total_steps, start
        )

    def batch(
        self,
        step: int,
        batch_size: int,
        rows: slice | Sequence[int] = slice(None),
        row_limit: int | None = None,
    ) -> Batch:
        """Returns batch `step`, or the given rows of it, arrays [B, T]."""
        indices = choose(range(step * batch_size, (step + 1) * batch_size), rows)
        batch = self.empty_batch(len(indices))
        for at, index in enumerate(indices):
            if row_limit is None or index < row_limit:
                self._fill(batch, at, index)
        return batch

    def stats(self) -> dict[str, Any]:
        """Returns counts of the first epoch and how full its rows are."""
        rows = self.rows_per_epoch(0)
        examples = np.concatenate([self._plan(b).examples for b in range(self._blocks)])
        slots = int(self._lengths[examples].sum())
        tokens = slots - int(self._virtual[examples].sum())
        return {
            "sources": [store.counts.as_dict() for store in self.stores],
            "examples_per_epoch": len(examples),
            "tokens_per_epoch": tokens,
            "rows_per_epoch": rows,
            "efficiency": slots / (rows * self.seq_len),
        }

    def fingerprint(self) -> str:
        """Returns a hash of everything that decides the rows, in hexadecimal."""
        facts = [
            [store.fingerprint() for store in self.stores],
            list(self.weights),
            [self.seq_len, self.num_virtual, self.packing, self.shuffle, self.seed],
        ]
        return hashlib.blake2b(json.dumps(facts).encode(), digest_size=16).hexdigest()

    def _span(self, block: int) -> tuple[int, int]:
        epoch, part = divmod(block, self._blocks)
        first = epoch * self._order.epoch
        return first + part * _BLOCK, first + min((part + 1) * _BLOCK, self._order.epoch)

    def _first_row(self, block: int) -> int:
        if not self.packing:
            return self._span(block)[0]
        with self._lock:
            while len(self._first_rows) <= block:
                known = len(self._first_rows) - 1
                rows = len(self._plan(known).starts) - 1
                self._first_rows.append(self._first_rows[-1] + rows)
            return self._first_rows[block]

    def _block_of_row(self, index: int) -> int:
        if not self.packing:
            epoch, part = divmod(index, self._order.epoch)
            return epoch * self._blocks + part // _BLOCK
        with self._lock:
            while self._first_rows[-1] <= index:
                self._first_row(len(self._first_rows))
            return int(np.searchsorted(self._first_rows, index, side="right")) - 1

    def _plan(self, block: int) -> _Plan:
        with self._lock:
            if block in self._plans:
                self._plans.move_to_end(block)
                return self._plans[block]
            examples = self._order.examples(*self._span(block))
            if self.packing:
                rows = pack(self._lengths[examples], self.seq_len, seed=_seed(self.seed, block))
                if not self.shuffle:
                    rows.sort(key=lambda row: int(row[0]))
                starts = np.cumsum([0] + [len(row) for row in rows])
                plan = _Plan(examples[np.concatenate(rows)], starts)
            else:
                plan = _Plan(examples, np.arange(len(examples) + 1))
            self._plans[block] = plan
            if len(self._plans) > max(_KEPT_PLANS, self._blocks if self._blocks < 16 else 0):
                self._plans.popitem(last=False)
            return plan

    def _examples(self, row: int) -> np.ndarray:
        block = self._block_of_row(row)
        plan, local = self._plan(block), row - self._first_row(block)
        return plan.examples[plan.starts[local] : plan.starts[local + 1]]

    def _rows_holding(self, amount: int, *, tokens: bool) -> int:
        """Returns the smallest number of rows with `amount` examples or real tokens."""
        held = block = 0
        while True:
            plan = self._plan(block)
            if tokens:
                sizes = self._lengths[plan.examples] - self._virtual[plan.examples]
                after = np.concatenate([[0], np.cumsum(sizes)])[plan.starts[1:]]
            else:
                after = plan.starts[1:]
            if held + after[-1] >= amount:
                return self._first_row(block) + int(np.searchsorted(after, amount - held)) + 1
            held, block = held + int(after[-1]), block + 1

    def _fill(self, batch: Batch, at: int, index: int) -> None:
        cursor = Cursor()
        for store, example in self.examples_of_row(index):
            cursor = put_stored(batch, at, cursor, self.stores[store], example, self.num_virtual)


def _seed(seed: int, block: int) -> int:
    digest = hashlib.blake2b(f"{seed}/rows/{block}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")
