"""A source of which each of several processes tokenises its own share of the records.

The lengths of all examples are known to all, since they decide the rows; the tokens of another
process's records are rendered when a row of this process holds them.
"""

from __future__ import annotations

import dataclasses
import functools
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jaxtune.core.errors import RequestError
from jaxtune.data.columns import DTYPES, room
from jaxtune.data.sources import Source
from jaxtune.data.store import all_dropped, tokenize
from jaxtune.data.token_store import PIECE, Counts, TokenStore, fingerprint_of, keys_of
from jaxtune.data.tokenizer import Tokenizer
from jaxtune.parallel.processes import all_agree, gather, gather_arrays

# Documents that give so many windows each are tokenised whole by every process: a window would
# cost its whole document.
_WINDOWS = 4
# Tokens of other processes' records that are kept for their next use.
_KEPT = 1 << 22


@dataclasses.dataclass(frozen=True, eq=False)
class SharedStore:
    """The examples of a source as a TokenStore has them, of which a share lies in memory.

    Attributes:
        own: the examples of this process's records.
        first: number of the first of them.
        lengths: int64 [examples], of all.
        records: int64 [examples], the record each came from.
        counts: what became of all records.
        source: the records.
        render: record → its examples.
        digest: the fingerprint, that of the whole source in one process.
        prompts, sides, completions: int64 [examples], of all, as a TokenStore has them.
        added: {name: array [total]}, columns of all examples that `with_column` added.
    """

    own: TokenStore
    first: int
    lengths: np.ndarray
    records: np.ndarray
    counts: Counts
    source: Source
    render: Callable[[range], TokenStore]
    digest: str
    prompts: np.ndarray
    sides: np.ndarray
    completions: np.ndarray
    added: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    kept: OrderedDict[int, TokenStore] = dataclasses.field(default_factory=OrderedDict)
    lock: Any = dataclasses.field(default_factory=threading.Lock)  # rows are made by threads

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def format(self) -> str:
        """That of the examples; see `TokenStore`."""
        return self.own.format

    @property
    def shared(self) -> bool:
        """Whether the completions of a prompt share it in a row."""
        return self.own.shared

    @property
    def keys(self) -> tuple[str, ...]:
        """Names of the batch keys that its examples have beside those of every batch."""
        return keys_of(self.format, self.shared, tuple(self.added))

    @property
    def targets(self) -> np.ndarray:
        """A number that each example's targets do not exceed, the same in all processes."""
        return self.lengths

    def room(self, num_virtual: int) -> np.ndarray:
        """Returns how many tokens of a row each example takes, int64 [examples]."""
        return room(self.lengths, self.prompts, self.sides, self.shared, num_virtual)

    def example(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns ids int32 [T] and mask float32 [T] of an example."""
        store, number = self._held(index)
        return store.example(number)

    def example_columns(self, index: int) -> dict[str, np.ndarray]:
        """Returns the columns of an example, {name: array [T]}; see `columns.example_columns`."""
        if not self.keys:
            return {}
        store, number = self._held(index)
        start = int(self._starts[index])
        tokens = slice(start, start + int(self.lengths[index]))
        added = {name: array[tokens] for name, array in self.added.items()}
        return store.example_columns(number) | added

    def with_column(self, name: str, flat: np.ndarray) -> SharedStore:
        """Returns the store with one more batch key; see `TokenStore.with_column`.

        Args:
            name: of the key.
            flat: float32 [total], of all examples.
        """
        if flat.shape != (int(self.lengths.sum()),):
            raise ValueError(f"{name} has shape {flat.shape} for {self.lengths.sum()} tokens")
        added = {**self.added, name: np.asarray(flat, DTYPES[name])}
        return dataclasses.replace(self, added=added)

    def example_roles(self, index: int) -> None:
        """Returns None: roles are not kept."""
        return None

    def where(self, index: int) -> str:
        """Returns the place of an example in its source, as `FILE:LINE`."""
        return self.source.where(int(self.records[index]))

    def head(self, count: int) -> SharedStore:
        """Returns a store of the first `count` examples; its counts stay those of the source."""
        here = max(min(count - self.first, len(self.own)), 0)
        return dataclasses.replace(
            self,
            own=self.own.head(here),
            **{
                name: getattr(self, name)[:count]
                for name in ("lengths", "records", "prompts", "sides", "completions")
            },
        )

    def fingerprint(self) -> str:
        """Returns a hash of every token, weight and boundary, in hexadecimal."""
        return self.digest

    @functools.cached_property
    def _starts(self) -> np.ndarray:
        return np.cumsum(self.lengths) - self.lengths

    def _held(self, index: int) -> tuple[TokenStore, int]:
        """Returns a store in memory that has an example, and the example's number in it."""
        if self.first <= index < self.first + len(self.own):
            return self.own, index - self.first
        record = int(self.records[index])
        return self._rendered(record), index - int(np.searchsorted(self.records, record))

    def _rendered(self, record: int) -> TokenStore:
        with self.lock:
            if record in self.kept:
                self.kept.move_to_end(record)
                return self.kept[record]
        store = self.render(range(record, record + 1))
        with self.lock:
            self.kept[record] = store
            held = sum(len(other.ids) for other in self.kept.values())
            while held > _KEPT and len(self.kept) > 1:
                held -= len(self.kept.popitem(last=False)[1].ids)
        return store


def share(size: int, count: int, index: int) -> range:
    """Returns the records of process `index` of `count`: whole pieces, one after the other.

    >>> [share(70, 2, i) for i in range(2)]
    [range(0, 32), range(32, 70)]
    """
    pieces = -(-size // PIECE)
    start, end = (pieces * i // count * PIECE for i in (index, index + 1))
    return range(min(start, size), min(end, size))


def tokenize_shared(
    source: Source,
    format: str,
    tokenizer: Tokenizer | None,
    *,
    count: int,
    index: int,
    seq_len: int,
    num_virtual: int = 0,
    key: str | None = None,
    **options: Any,
) -> TokenStore | SharedStore:
    """Returns what `tokenize` returns, made by all processes together.

    Args:
        count, index: processes, and which one this is; the rest as for `tokenize`.

    Raises:
        RequestError: in all processes, the first record's that any of them refuses.
    """

    def render(records: range | None) -> TokenStore:
        return tokenize(
            source,
            format,
            tokenizer,
            seq_len=seq_len,
            num_virtual=num_virtual,
            key=key,
            records=records,
            **options,
        )

    if count == 1:
        return render(None)
    here = share(len(source), count, index)
    refused = own = None
    try:
        own = render(here)
    except RequestError as error:
        refused = error
    all_agree("tokenised data", refused)
    told = gather("counts", [own.counts.as_dict(), len(source)])
    if len({size for _, size in told}) > 1:
        sizes = ", ".join(f"{size} in process {i}" for i, (_, size) in enumerate(told))
        raise RequestError(f"the hosts do not have the same records: {sizes}", key=key)
    parts = [counts for counts, _ in told]
    total = Counts(**{name: sum(part[name] for part in parts) for name in parts[0]})
    if not total.examples:
        raise all_dropped(len(source), seq_len, num_virtual, key)
    if total.examples > _WINDOWS * total.records:
        return render(None)
    lengths = np.concatenate(gather_arrays(own.lengths.astype(np.int32)))
    numbers = np.concatenate(gather_arrays((own.records - here.start).astype(np.int32)))
    firsts = np.cumsum([0] + [part["examples"] for part in parts])
    starts = [share(len(source), count, i).start for i in range(count)]
    records = numbers + np.repeat(starts, np.diff(firsts))
    return SharedStore(
        own,
        int(firsts[index]),
        lengths.astype(np.int64),
        records.astype(np.int64),
        total,
        source,
        render,
        fingerprint_of(np.concatenate(gather_arrays(own.digests()))),
        *(_of_all(own, name, len(lengths)) for name in ("prompts", "sides", "completions")),
    )


def _of_all(own: TokenStore, name: str, count: int) -> np.ndarray:
    """Returns an array [examples] of all processes, one after the other."""
    if not own.format:  # the same for each
        return np.broadcast_to(np.int64(name == "sides"), count)
    parts = gather_arrays(getattr(own, name).astype(np.int32))
    return np.concatenate(parts).astype(np.int64)
