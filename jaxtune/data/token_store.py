"""Tokenised examples in flat arrays: lengths, columns, fingerprint."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property

import numpy as np

from jaxtune.data.columns import BRANCHED, DTYPES, KEYS, example_columns, room
from jaxtune.data.sources import Source

# Records hashed together, so that several processes can hash a source in parts.
PIECE = 16


@dataclass(frozen=True)
class Counts:
    """What became of the records; `tokens_in == tokens_kept + tokens_dropped + tokens_truncated`.

    Attributes:
        records: records of the source.
        examples: examples kept; more than records where documents were cut into windows.
        dropped: records left out because they are too long, or have no target once cut.
        truncated: records that lost their end.
        tokens_in: tokens of all records.
        tokens_kept: tokens that are in the store, each counted once.
        tokens_dropped: tokens of dropped records.
        tokens_truncated: tokens cut off.
        tokens_repeated: context tokens that windows repeat from the window before.
        trained_tokens: targets in the store.
    """

    records: int = 0
    examples: int = 0
    dropped: int = 0
    truncated: int = 0
    tokens_in: int = 0
    tokens_kept: int = 0
    tokens_dropped: int = 0
    tokens_truncated: int = 0
    tokens_repeated: int = 0
    trained_tokens: int = 0

    def as_dict(self) -> dict[str, int]:
        """Returns the counts by name."""
        return asdict(self)


@dataclass(frozen=True, eq=False)
class TokenStore:
    """Examples in flat arrays.

    Attributes:
        ids: int32 [total].
        mask: float32 [total], weight of each token as a target; 0 for each example's first.
        offsets: int64 [examples + 1], where examples begin in the flat arrays.
        records: int64 [examples], the record each example came from.
        counts: what became of the records.
        source: gives the place of a record.
        roles: uint8 [total], indices into `chat.ROLE_NAMES`, if they were asked for.
        format: that of the examples where `columns.KEYS` has it, else "".
        shared: whether the completions of a prompt share it in a row.
        columns: {name: array [total]}, what is kept of each token; see `columns`.
        values: {name: float32 [examples]}, what is kept of each example.
        added: names of the columns that `with_column` added.
        prompts: int64 [examples], tokens of the prompt that completions may share.
        sides: int64 [examples], how many completions may share it; 1 where nothing is shared.
        completions: int64 [examples], how many completions each example has.
    """

    ids: np.ndarray
    mask: np.ndarray
    offsets: np.ndarray
    records: np.ndarray
    counts: Counts
    source: Source
    roles: np.ndarray | None = None
    format: str = ""
    shared: bool = False
    columns: Mapping[str, np.ndarray] = field(default_factory=dict)
    values: Mapping[str, np.ndarray] = field(default_factory=dict)
    added: tuple[str, ...] = ()
    lengths: np.ndarray = field(init=False)
    prompts: np.ndarray = field(init=False)
    sides: np.ndarray = field(init=False)
    completions: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        count = len(self.offsets) - 1
        prompts, sides = np.zeros(count, np.int64), np.ones(count, np.int64)
        completions = sides if self.format else prompts
        if self.format in BRANCHED and count:
            branches = self.columns["branches"]
            prompts = np.add.reduceat(branches == 0, self.offsets[:-1], dtype=np.int64)
            completions = sides = branches[self.offsets[1:] - 1].astype(np.int64)
        elif self.format == "stepwise" and count:
            completions = self.targets
        for name, array in (
            ("lengths", np.diff(self.offsets)),
            ("prompts", prompts),
            ("sides", sides),
            ("completions", completions),
        ):
            object.__setattr__(self, name, array)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def example(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns ids int32 [T] and mask float32 [T] of an example, as views."""
        start, end = self.offsets[index], self.offsets[index + 1]
        return self.ids[start:end], self.mask[start:end]

    @cached_property
    def targets(self) -> np.ndarray:
        """How many targets each example has, int64 [examples]."""
        if not len(self):
            return np.zeros(0, np.int64)
        return np.add.reduceat(self.mask > 0, self.offsets[:-1], dtype=np.int64)

    @property
    def keys(self) -> tuple[str, ...]:
        """Names of the batch keys that its examples have beside those of every batch."""
        return keys_of(self.format, self.shared, self.added)

    def room(self, num_virtual: int) -> np.ndarray:
        """Returns how many tokens of a row each example takes, int64 [examples]."""
        return room(self.lengths, self.prompts, self.sides, self.shared, num_virtual)

    def example_columns(self, index: int) -> dict[str, np.ndarray]:
        """Returns the columns of an example, {name: array [T]}; see `columns.example_columns`."""
        if not (self.format or self.added):
            return {}
        tokens = slice(self.offsets[index], self.offsets[index + 1])
        columns = {name: array[tokens] for name, array in self.columns.items()}
        if not self.format:
            return columns
        values = {name: float(array[index]) for name, array in self.values.items()}
        return example_columns(self.format, self.mask[tokens], columns, values)

    def with_column(self, name: str, flat: np.ndarray) -> TokenStore:
        """Returns the store with one more batch key.

        Args:
            name: of the key, in `columns.DTYPES`.
            flat: float32 [total], one value a token at the token's own place.

        Raises:
            ValueError: the array has another length.
        """
        if flat.shape != self.ids.shape:
            raise ValueError(f"{name} has shape {flat.shape} for {len(self.ids)} tokens")
        columns = {**self.columns, name: np.asarray(flat, DTYPES[name])}
        added = tuple(dict.fromkeys((*self.added, name)))
        return replace(self, columns=columns, added=added)

    def example_roles(self, index: int) -> np.ndarray | None:
        """Returns the roles uint8 [T] of an example, or None if they were not kept."""
        if self.roles is None:
            return None
        return self.roles[self.offsets[index] : self.offsets[index + 1]]

    def head(self, count: int) -> TokenStore:
        """Returns a store of the first `count` examples; its counts stay those of the source."""
        offsets = self.offsets[: count + 1]
        end = int(offsets[-1])
        return replace(
            self,
            ids=self.ids[:end],
            mask=self.mask[:end],
            offsets=offsets,
            records=self.records[:count],
            roles=None if self.roles is None else self.roles[:end],
            columns={name: array[:end] for name, array in self.columns.items()},
            values={name: array[:count] for name, array in self.values.items()},
        )

    def where(self, index: int) -> str:
        """Returns the place of an example in its source, as `FILE:LINE`."""
        return self.source.where(int(self.records[index]))

    def fingerprint(self) -> str:
        """Returns a hash of every token, weight and boundary, in hexadecimal.

        What `with_column` added is left out: it follows from the tokens and a reference.
        """
        return fingerprint_of(self.digests())

    def digests(self) -> np.ndarray:
        """Returns uint8 [pieces, 16], a hash of the examples of each `PIECE` records in turn."""
        pieces = self.records // PIECE
        firsts = np.flatnonzero(np.diff(pieces, prepend=-1))
        out = np.empty((len(firsts), 16), np.uint8)
        for at, (first, end) in enumerate(itertools.pairwise([*firsts, len(self)])):
            digest = hashlib.blake2b(digest_size=16)
            tokens = slice(self.offsets[first], self.offsets[end])
            arrays = [self.ids[tokens], self.mask[tokens], self.lengths[first:end]]
            arrays += [self.columns[n][tokens] for n in sorted({*self.columns} - {*self.added})]
            arrays += [self.values[name][first:end] for name in sorted(self.values)]
            for array in arrays:
                digest.update(np.ascontiguousarray(array).view(np.uint8))
            out[at] = np.frombuffer(digest.digest(), np.uint8)
        return out


def keys_of(format: str, shared: bool, added: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Returns the batch keys that examples of a format have beside those of every batch.

    Args:
        format: a name in `formats.FORMATS`, or "".
        shared: whether the completions of a prompt share it in a row.
        added: columns that were added.
    """
    branches = ("branches",) if shared and format in BRANCHED else ()
    return (*KEYS.get(format, ()), *branches, *added)


def fingerprint_of(digests: np.ndarray) -> str:
    """Returns the fingerprint of a store from its `digests`."""
    return hashlib.blake2b(np.ascontiguousarray(digests), digest_size=16).hexdigest()
