"""Prompts for online reinforcement learning: ids to generate from, and what rewards are told."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from jaxtune.core.errors import RequestError, nearest
from jaxtune.data.formats import Prompt, parse
from jaxtune.data.order import Order
from jaxtune.data.sources import Source
from jaxtune.data.template import fit_messages, render
from jaxtune.data.tokenizer import Tokenizer

# A prompt that is cut would ask something else.
OVERLONG = ("error", "drop")


@dataclass(frozen=True)
class PromptCounts:
    """What became of the records; `tokens_in == tokens_kept + tokens_dropped`."""

    records: int = 0
    prompts: int = 0
    dropped: int = 0
    tokens_in: int = 0
    tokens_kept: int = 0
    tokens_dropped: int = 0

    def as_dict(self) -> dict[str, int]:
        """Returns the counts by name."""
        return asdict(self)


@dataclass(frozen=True, eq=False)
class PromptStore:
    """The prompts of a source.

    Attributes:
        ids: int32 [total], from which the assistant's words are generated.
        offsets: int64 [prompts + 1], where prompts begin in `ids`.
        texts: what `ids` are of: the prompt, or what the chat template writes for its messages.
        rows: the other fields of each record, as JSON gives them.
        records: int64 [prompts], the record each prompt came from.
        counts: what became of the records.
        source: gives the place of a record.
    """

    ids: np.ndarray
    offsets: np.ndarray
    texts: tuple[str, ...]
    rows: tuple[Mapping[str, Any], ...]
    records: np.ndarray
    counts: PromptCounts
    source: Source

    def __len__(self) -> int:
        return len(self.texts)

    def where(self, index: int) -> str:
        """Returns the place of a prompt in its source, as `FILE:LINE`."""
        return self.source.where(int(self.records[index]))

    def fingerprint(self) -> str:
        """Returns a hash of every token, boundary and field, in hexadecimal."""
        digest = hashlib.blake2b(digest_size=16)
        for array in (self.ids, self.offsets):
            digest.update(np.ascontiguousarray(array).view(np.uint8))
        for row in self.rows:
            # A source may hold arrays and bytes, of which JSON knows nothing.
            digest.update(json.dumps(row, sort_keys=True, default=repr).encode() + b"\n")
        return digest.hexdigest()


@dataclass(frozen=True, eq=False)
class Prompts:
    """The prompts of a run: an endless order of them, at random access.

    Prompts are numbered through all stores. The order is that of `order.Order`: what position p
    holds follows from the seed and p alone, so that iteration i, which takes `take(i * n, n)`, is
    the same in every process and after every restart.

    Attributes:
        stores: of each source.
        weights: proportion in which prompts of each source are drawn.
        shuffle: gives each pass over a source an order of its own.
        seed: of every shuffle.
    """

    stores: tuple[PromptStore, ...]
    weights: tuple[float, ...] = ()
    shuffle: bool = True
    seed: int = 0
    order: Order = field(init=False)

    def __post_init__(self) -> None:
        weights = self.weights or (1.0,) * len(self.stores)
        sizes = [len(store) for store in self.stores]
        object.__setattr__(self, "weights", tuple(weights))
        order = Order(sizes, weights, shuffle=self.shuffle, seed=self.seed)
        object.__setattr__(self, "order", order)

    def __len__(self) -> int:
        return int(self.order.bases[-1])

    @property
    def epoch(self) -> int:
        """The smallest number of prompts taken from the start in which each one is."""
        return self.order.epoch

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt."""
        return max(int(np.diff(store.offsets).max()) for store in self.stores)

    def take(self, first: int, count: int) -> list[int]:
        """Returns the numbers of the prompts at positions first..first+count-1 of the order."""
        return self.order.examples(first, first + count).tolist()

    def ids(self, number: int) -> np.ndarray:
        """Returns the ids int32 [n] of a prompt."""
        store, index = self._find(number)
        return store.ids[store.offsets[index] : store.offsets[index + 1]]

    def text(self, number: int) -> str:
        """Returns a prompt as text."""
        store, index = self._find(number)
        return store.texts[index]

    def where(self, number: int) -> str:
        """Returns the place of a prompt in its source, as `FILE:LINE`."""
        store, index = self._find(number)
        return store.where(index)

    def columns(self, numbers: Sequence[int]) -> dict[str, list[Any]]:
        """Returns the other fields of prompts, a value each, for reward functions.

        Every field that any prompt of the run has is there; None for prompts without it.
        """
        rows = []
        for number in numbers:
            store, index = self._find(number)
            rows.append(store.rows[index])
        return {name: [row.get(name) for row in rows] for name in self.names}

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the fields that prompts have besides the prompt, in order of appearance."""
        seen = (name for store in self.stores for row in store.rows for name in row)
        return tuple(dict.fromkeys(seen))

    def fingerprint(self) -> str:
        """Returns a hash of everything that decides which prompt comes when, in hexadecimal."""
        prints = [store.fingerprint() for store in self.stores]
        facts = [prints, list(self.weights), self.shuffle, self.seed]
        return hashlib.blake2b(json.dumps(facts).encode(), digest_size=16).hexdigest()

    def _find(self, number: int) -> tuple[PromptStore, int]:
        store = int(np.searchsorted(self.order.bases, number, side="right")) - 1
        return self.stores[store], int(number - self.order.bases[store])


def read_prompts(
    source: Source,
    tokenizer: Tokenizer,
    *,
    max_prompt: int,
    overlong: str = "error",
    key: str | None = None,
) -> PromptStore:
    """Renders every record of a source of format "prompt".

    A string is tokenised as it is, with what the tokenizer adds (BOS); messages are rendered by
    the chat template, up to where the assistant's words begin.

    Args:
        source: the records.
        tokenizer: with a chat template, if there are messages.
        max_prompt: the most tokens of a prompt.
        overlong: "error", or "drop" to leave longer ones out.
        key: config key named in errors.

    Raises:
        RequestError: a record is malformed, empty or too long, with its line; or none is left.
    """
    if overlong not in OVERLONG:
        raise RequestError(
            f"unknown overlong {overlong!r}{nearest(overlong, OVERLONG)} of prompts: "
            f"{', '.join(OVERLONG)}",
            key="data.overlong",
        )
    parts: list[np.ndarray] = []
    texts, rows, records = [], [], []
    tally = dict.fromkeys(PromptCounts.__dataclass_fields__, 0) | {"records": len(source)}
    for record in range(len(source)):
        where, fields = source.where(record), source[record]
        prompt = parse(fields, "prompt", chat=bool(tokenizer.chat_template), where=where, key=key)
        try:
            text, ids = _encode(prompt, tokenizer)
            if not ids:
                raise RequestError("the prompt has no token")
        except RequestError as error:
            raise RequestError(error.message, key=error.key or key, where=where) from None
        tally["tokens_in"] += len(ids)
        if len(ids) > max_prompt:
            if overlong == "error":
                raise RequestError(
                    f"the prompt has {len(ids)} tokens, more than {max_prompt}: raise "
                    "data.max_prompt, or set data.overlong to 'drop'",
                    key=key,
                    where=where,
                )
            tally["dropped"] += 1
            tally["tokens_dropped"] += len(ids)
            continue
        parts.append(np.array(ids, np.int32))
        texts.append(text)
        rows.append({name: value for name, value in fields.items() if name != "prompt"})
        records.append(record)
    if not parts:
        raise RequestError(
            f"all {len(source)} prompts are longer than {max_prompt} tokens and were dropped",
            key=key,
        )
    lengths = [len(part) for part in parts]
    tally["prompts"], tally["tokens_kept"] = len(parts), sum(lengths)
    return PromptStore(
        np.concatenate(parts),
        np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        tuple(texts),
        tuple(rows),
        np.array(records, np.int64),
        PromptCounts(**tally),
        source,
    )


def _encode(prompt: Prompt, tokenizer: Tokenizer) -> tuple[str, list[int]]:
    """Returns the text of a prompt and its ids."""
    if isinstance(prompt.prompt, str):
        return prompt.prompt, tokenizer.encode(prompt.prompt)
    if not tokenizer.chat_template:
        raise RequestError("the tokenizer has no chat template; set data.template")
    messages = fit_messages(prompt.prompt, tokenizer.chat_template, tokenizer.turn_end)
    text = render(tokenizer.hf, messages, prompt.tools or None, generation=True)
    return text, tokenizer.encode(text, special=False)
