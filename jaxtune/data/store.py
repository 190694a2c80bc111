"""Tokenised examples: everything is rendered once, at the start, into flat arrays.

So every bad example is an error before anything trains, lengths are known to the packer, and a
position in the data is one integer.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property

import numpy as np

from jaxtune.core.errors import RequestError, nearest
from jaxtune.data.chat import Draft, Rendered, encode_drafts
from jaxtune.data.columns import BRANCHED, DTYPES, KEYS, example_columns, room
from jaxtune.data.fit import positions_of, room_of, truncated, windows
from jaxtune.data.formats import Example, Tokens, check_format, parse
from jaxtune.data.preferences import split_pair
from jaxtune.data.sides import drafts_of, joined
from jaxtune.data.sources import Source
from jaxtune.data.tokenizer import Tokenizer

OVERLONG = ("error", "drop", "truncate")
# Records tokenised together: enough to keep the tokenizer's threads busy, little to hold.
_CHUNK = 1024
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
            completions = np.add.reduceat(self.mask > 0, self.offsets[:-1], dtype=np.int64)
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


def tokenize(
    source: Source,
    format: str,
    tokenizer: Tokenizer | None,
    *,
    seq_len: int,
    overlong: str = "error",
    num_virtual: int = 0,
    vocab_size: int | None = None,
    key: str | None = None,
    keep_roles: bool = False,
    records: range | None = None,
    shared: bool = False,
    split_pairs: bool = False,
    context: int | None = None,
) -> TokenStore:
    """Renders every record of a source.

    An example may have `seq_len - num_virtual` tokens; one with several completions counts as
    `room` says, and is cut as `fit.truncated` says. A longer one is an error, or is left out
    (`drop`), or loses its right end (`truncate`; it is dropped if no target is left). Under
    `error`, a longer document of format "text" is cut into windows instead: each begins with the
    last token of the one before as context, so that every token but the document's first is a
    target exactly once.

    Args:
        source: the records.
        format: a name in `formats.FORMATS`.
        tokenizer: may be None for format "tokens".
        seq_len: tokens a row, virtual tokens included.
        overlong: "error", "drop" or "truncate".
        num_virtual: slots of prompt tuning that come before each example.
        vocab_size: ids must be below it; the tokenizer's if None.
        key: config key named in errors.
        keep_roles: keeps the role of each token, for `inspect`.
        records: renders these alone; then a store without examples is none too few.
        shared: lets the completions of a prompt share it in a row, as packing does.
        split_pairs: makes two unpaired examples of each pair of format "preference".
        context: positions that the model has for a text, virtual tokens included: what a prompt
            and any one of its completions may have, where a row holds several. By default
            `seq_len`.

    Raises:
        RequestError: a record is malformed, too long, empty, or has no target, with its line.
    """
    check_format(format, key)
    if format == "prompt":
        raise RequestError("format 'prompt' holds nothing to train on", key=key)
    if overlong not in OVERLONG:
        raise RequestError(
            f"unknown overlong {overlong!r}{nearest(overlong, OVERLONG)}: {', '.join(OVERLONG)}",
            key="data.overlong",
        )
    context = seq_len if context is None else min(context, seq_len)
    capacity = context - num_virtual
    if capacity < 2:
        raise RequestError(
            f"seq_len {context} leaves {capacity} tokens beside {num_virtual} virtual ones; an "
            "example needs at least 2",
            key="data.seq_len",
        )
    if tokenizer is None and format != "tokens":
        raise RequestError(f"format {format!r} needs a tokenizer, and the model has none", key=key)
    if vocab_size is None and tokenizer is not None:
        vocab_size = tokenizer.vocab_size
    tally = dict.fromkeys(Counts.__dataclass_fields__, 0) | {
        "records": len(source if records is None else records)
    }
    parts: list[Rendered] = []
    numbers: list[int] = []
    chosen = range(len(source)) if records is None else records
    shared = shared and format in BRANCHED and not split_pairs
    rendered = _render(source, chosen, format, tokenizer, vocab_size, key, split_pairs)
    for record, item in rendered:
        length = len(item.ids)
        tally["tokens_in"] += length
        if not item.mask.any():
            raise RequestError(
                "no token of this example is trained", key=key, where=source.where(record)
            )
        pieces = [item]
        size, reach = room_of(item, shared, num_virtual), positions_of(item, num_virtual)
        if size > seq_len or reach > context:
            if overlong == "truncate":
                left = truncated(item, seq_len, context, shared, num_virtual)
                pieces = [] if left is None else [left]
                if left is not None:
                    tally["truncated"] += 1
                    tally["tokens_truncated"] += length - len(left.ids)
            elif overlong == "drop":
                pieces = []
            elif format == "text":
                pieces = list(windows(item, capacity))
                tally["tokens_repeated"] += len(pieces) - 1
            else:
                remedy = "set data.overlong to 'truncate' or 'drop'"
                if size > seq_len:
                    fault = f"the example has {size - num_virtual} tokens, more than "
                    fault += _limit(seq_len, num_virtual)
                    remedy = f"raise data.seq_len, or {remedy}"
                else:
                    fault = f"a side of the example has {reach} positions with its prompt, more "
                    fault += f"than the model's {context}"
                raise RequestError(f"{fault}: {remedy}", key=key, where=source.where(record))
        if not pieces:
            tally["dropped"] += 1
            tally["tokens_dropped"] += length
        parts += pieces
        numbers += [record] * len(pieces)
    if not parts and records is None:
        raise all_dropped(len(source), seq_len, num_virtual, key)
    lengths = [len(p.ids) for p in parts]
    mask = _joined([p.mask for p in parts], np.float32)
    tally["examples"] = len(parts)
    tally["tokens_kept"] = sum(lengths) - tally["tokens_repeated"]
    tally["trained_tokens"] = int(np.count_nonzero(mask))
    return TokenStore(
        ids=_joined([p.ids for p in parts], np.int32),
        mask=mask,
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        records=np.array(numbers, np.int64),
        counts=Counts(**tally),
        source=source,
        roles=_joined([p.roles for p in parts], np.uint8) if keep_roles else None,
        format="unpaired" if split_pairs else format if format in KEYS else "",
        shared=shared,
        columns={
            name: _joined([p.columns[name] for p in parts], DTYPES[name])
            for name in (parts[0].columns if parts else ())
        },
        values={
            name: np.array([p.values[name] for p in parts], np.float32)
            for name in (parts[0].values if parts else ())
        },
    )


def all_dropped(count: int, seq_len: int, num_virtual: int, key: str | None) -> RequestError:
    """Returns the error of a source of which no example fits."""
    limit = _limit(seq_len, num_virtual)
    return RequestError(f"all {count} examples are longer than {limit} and were dropped", key=key)


def _limit(seq_len: int, num_virtual: int) -> str:
    return f"seq_len {seq_len}" + (f" less {num_virtual} virtual tokens" if num_virtual else "")


def _joined(parts: list[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate(parts) if parts else np.zeros(0, dtype)


def _render(
    source: Source,
    records: range,
    format: str,
    tokenizer: Tokenizer | None,
    vocab_size: int | None,
    key: str | None,
    split_pairs: bool,
) -> Iterator[tuple[int, Rendered]]:
    """Yields (record, rendered example) in order."""
    chat = tokenizer is not None and bool(tokenizer.chat_template)

    def refused(error: RequestError, where: str | None = None) -> RequestError:
        # Keys of the renderer's own (data.template) say more than the source's.
        return RequestError(error.message, key=error.key or key, where=where)

    for start in range(0, len(records), _CHUNK):
        drafts: list[Draft] = []
        waiting: list[tuple[int, Example, slice]] = []
        for record in records[start : start + _CHUNK]:
            where = source.where(record)
            example = parse(source[record], format, chat=chat, where=where, key=key)
            try:
                if isinstance(example, Tokens):
                    yield record, _check_tokens(example, vocab_size)
                    continue
                for one in split_pair(example) if split_pairs else (example,):
                    first = len(drafts)
                    drafts += drafts_of(one, tokenizer)
                    waiting.append((record, one, slice(first, len(drafts))))
            except RequestError as error:
                raise refused(error, where) from None
        if not drafts:
            continue
        try:
            rendered = encode_drafts(drafts, tokenizer)
        except RequestError as error:
            raise refused(error) from None
        for record, example, chosen in waiting:
            try:
                item = joined(example, drafts[chosen], rendered[chosen])
            except RequestError as error:
                raise refused(error, source.where(record)) from None
            yield record, item


def _check_tokens(example: Tokens, vocab_size: int | None) -> Rendered:
    low, high = min(example.input_ids), max(example.input_ids)
    limit = 2**31 if vocab_size is None else vocab_size
    if low < 0 or high >= limit:
        bad = low if low < 0 else high
        raise RequestError(f"input_ids holds {bad}, which is not in 0..{limit - 1}")
    ids = np.array(example.input_ids, np.int32)
    if example.loss_mask is None:
        mask = np.ones(len(ids), np.float32)
    else:
        mask = np.array(example.loss_mask, np.float32)
    mask[0] = 0.0  # nothing comes before it to predict it from
    return Rendered(ids, mask, np.zeros(len(ids), np.uint8))
