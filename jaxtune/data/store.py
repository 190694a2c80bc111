"""Tokenised examples: everything is rendered once, at the start, into flat arrays.

So every bad example is an error before anything trains, lengths are known to the packer, and a
position in the data is one integer.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field

import numpy as np

from jaxtune.core.errors import RequestError, nearest
from jaxtune.data.chat import Rendered, draft, encode_drafts
from jaxtune.data.formats import Tokens, check_format, parse
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
    """

    ids: np.ndarray
    mask: np.ndarray
    offsets: np.ndarray
    records: np.ndarray
    counts: Counts
    source: Source
    roles: np.ndarray | None = None
    lengths: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "lengths", np.diff(self.offsets))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def example(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns ids int32 [T] and mask float32 [T] of an example, as views."""
        start, end = self.offsets[index], self.offsets[index + 1]
        return self.ids[start:end], self.mask[start:end]

    def example_roles(self, index: int) -> np.ndarray | None:
        """Returns the roles uint8 [T] of an example, or None if they were not kept."""
        if self.roles is None:
            return None
        return self.roles[self.offsets[index] : self.offsets[index + 1]]

    def head(self, count: int) -> TokenStore:
        """Returns a store of the first `count` examples; its counts stay those of the source."""
        offsets = self.offsets[: count + 1]
        end = int(offsets[-1])
        roles = None if self.roles is None else self.roles[:end]
        return TokenStore(
            self.ids[:end],
            self.mask[:end],
            offsets,
            self.records[:count],
            self.counts,
            self.source,
            roles,
        )

    def where(self, index: int) -> str:
        """Returns the place of an example in its source, as `FILE:LINE`."""
        return self.source.where(int(self.records[index]))

    def fingerprint(self) -> str:
        """Returns a hash of every token, weight and boundary, in hexadecimal."""
        return fingerprint_of(self.digests())

    def digests(self) -> np.ndarray:
        """Returns uint8 [pieces, 16], a hash of the examples of each `PIECE` records in turn."""
        pieces = self.records // PIECE
        firsts = np.flatnonzero(np.diff(pieces, prepend=-1))
        out = np.empty((len(firsts), 16), np.uint8)
        for at, (first, end) in enumerate(itertools.pairwise([*firsts, len(self)])):
            digest = hashlib.blake2b(digest_size=16)
            tokens = slice(self.offsets[first], self.offsets[end])
            for array in (self.ids[tokens], self.mask[tokens], self.lengths[first:end]):
                digest.update(np.ascontiguousarray(array).view(np.uint8))
            out[at] = np.frombuffer(digest.digest(), np.uint8)
        return out


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
) -> TokenStore:
    """Renders every record of a source.

    An example may have `seq_len - num_virtual` tokens. A longer one is an error, or is left out
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

    Raises:
        RequestError: a record is malformed, too long, empty, or has no target, with its line.
    """
    check_format(format, key)
    if overlong not in OVERLONG:
        raise RequestError(
            f"unknown overlong {overlong!r}{nearest(overlong, OVERLONG)}: {', '.join(OVERLONG)}",
            key="data.overlong",
        )
    capacity = seq_len - num_virtual
    if capacity < 2:
        raise RequestError(
            f"seq_len {seq_len} leaves {capacity} tokens beside {num_virtual} virtual ones; an "
            "example needs at least 2",
            key="data.seq_len",
        )
    if tokenizer is None and format != "tokens":
        raise RequestError(f"format {format!r} needs a tokenizer, and the model has none", key=key)
    if vocab_size is None and tokenizer is not None:
        vocab_size = tokenizer.vocab_size
    room = _room(seq_len, num_virtual)
    tally = dict.fromkeys(Counts.__dataclass_fields__, 0) | {
        "records": len(source if records is None else records)
    }
    parts: list[Rendered] = []
    numbers: list[int] = []
    chosen = range(len(source)) if records is None else records
    for record, item in _render(source, chosen, format, tokenizer, vocab_size, key):
        length = len(item.ids)
        tally["tokens_in"] += length
        if not item.mask.any():
            raise RequestError(
                "no token of this example is trained", key=key, where=source.where(record)
            )
        pieces = [item]
        if length > capacity:
            if overlong == "truncate":
                pieces = [_cut(item, 0, capacity)]
                if pieces[0].mask.any():
                    tally["truncated"] += 1
                    tally["tokens_truncated"] += length - capacity
                else:
                    pieces = []
            elif overlong == "drop":
                pieces = []
            elif format == "text":
                pieces = list(_windows(item, capacity))
                tally["tokens_repeated"] += len(pieces) - 1
            else:
                raise RequestError(
                    f"the example has {length} tokens, more than {room}: raise data.seq_len, or "
                    "set data.overlong to 'truncate' or 'drop'",
                    key=key,
                    where=source.where(record),
                )
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
    )


def all_dropped(count: int, seq_len: int, num_virtual: int, key: str | None) -> RequestError:
    """Returns the error of a source of which no example fits."""
    room = _room(seq_len, num_virtual)
    return RequestError(f"all {count} examples are longer than {room} and were dropped", key=key)


def _room(seq_len: int, num_virtual: int) -> str:
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
) -> Iterator[tuple[int, Rendered]]:
    """Yields (record, rendered example) in order."""
    chat = tokenizer is not None and bool(tokenizer.chat_template)
    for start in range(0, len(records), _CHUNK):
        chunk = records[start : start + _CHUNK]
        drafts = []
        for record in chunk:
            where = source.where(record)
            example = parse(source[record], format, chat=chat, where=where, key=key)
            try:
                if isinstance(example, Tokens):
                    yield record, _check_tokens(example, vocab_size)
                else:
                    drafts.append(draft(example, tokenizer))
            except RequestError as error:
                # Keys of the renderer's own (data.template) say more than the source's.
                raise RequestError(error.message, key=error.key or key, where=where) from None
        if drafts:
            try:
                rendered = encode_drafts(drafts, tokenizer)
            except RequestError as error:
                raise RequestError(error.message, key=error.key or key) from None
            yield from zip(chunk, rendered, strict=True)


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


def _cut(item: Rendered, start: int, end: int) -> Rendered:
    mask = item.mask[start:end].copy()
    mask[0] = 0.0
    return Rendered(item.ids[start:end], mask, item.roles[start:end])


def _windows(item: Rendered, capacity: int) -> Iterator[Rendered]:
    for start in range(0, len(item.ids) - 1, capacity - 1):
        yield _cut(item, start, start + capacity)
