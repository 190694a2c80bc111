"""Tokenised examples: everything is rendered once, at the start, into flat arrays.

So every bad example is an error before anything trains, lengths are known to the packer, and a
position in the data is one integer.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from jaxtune.core.errors import RequestError, nearest
from jaxtune.data.chat import Draft, Rendered, encode_drafts
from jaxtune.data.columns import BRANCHED, DTYPES, KEYS
from jaxtune.data.fit import positions_of, room_of, truncated, windows
from jaxtune.data.formats import Example, Tokens, check_format, parse
from jaxtune.data.preferences import split_pair
from jaxtune.data.sides import drafts_of, joined
from jaxtune.data.sources import Source
from jaxtune.data.token_store import Counts, TokenStore
from jaxtune.data.tokenizer import Tokenizer

OVERLONG = ("error", "drop", "truncate")
# Records tokenised together: enough to keep the tokenizer's threads busy, little to hold.
_CHUNK = 1024


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
