"""Config → tokenised data."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

from jaxtune.core.errors import RequestError
from jaxtune.data.columns import BRANCHED
from jaxtune.data.parts import parts_of
from jaxtune.data.review import digests, review
from jaxtune.data.shares import SharedStore, tokenize_shared
from jaxtune.data.sources import open_source
from jaxtune.data.stream import Budget, Stream
from jaxtune.data.token_store import TokenStore, keys_of
from jaxtune.data.tokenizer import Tokenizer
from jaxtune.models.config import ModelConfig
from jaxtune.parallel.processes import gather_arrays
from jaxtune.peft.method import Method
from jaxtune.recipes.schema.formats import splits_pairs

DURATIONS = ("total_steps", "total_epochs", "total_examples", "total_tokens")


@dataclasses.dataclass(frozen=True)
class Data:
    """The data of a run.

    Attributes:
        stream: rows for training.
        budget: how many steps.
        warmup_steps: learning-rate warm-up in steps.
        evals: {name: tokenised held-out source}.
        parts: {name: {value of a field: which of its examples have it, int64 [examples]}}, of
            held-out sources that are parted.
        mismatched: of an objective that needs them, prompts with completions of other prompts, in
            the order of `stream` and `evals`.
        teacher: what a teacher says of the targets, a `teacher_data.TopK`, where it is on disk.
        replay: old rows that each step reads too; see `recipes.retention.replay_mixing`.
    """

    stream: Stream
    budget: Budget
    warmup_steps: int
    evals: dict[str, TokenStore | SharedStore]
    mismatched: Data | None = None
    teacher: Any = None
    parts: dict[str, dict[str, np.ndarray]] = dataclasses.field(default_factory=dict)
    replay: Stream | None = None

    def told(self) -> dict[str, Any]:
        """Returns counts and reviews of what is trained on: `data`, and `replay` if there is any.

        All processes of a run ask together.
        """
        found = {"data": self.stream, "replay": self.replay}
        return {
            name: stream.stats() | {"review": reviews(stream)}
            for name, stream in found.items()
            if stream is not None
        }


def reviews(stream: Any) -> list[dict[str, Any]]:
    """Returns what `data.review` says of each source of a stream, in order.

    All processes of a run ask together: each has hashed its part of the examples.
    """
    out = []
    for store in stream.stores:
        here = store.own if isinstance(store, SharedStore) else store
        hashes = digests(here.ids, here.offsets)
        if here is store:  # of examples or of prompts
            out.append(review(np.diff(here.offsets), hashes))
        else:
            out.append(review(store.lengths, np.concatenate(gather_arrays(hashes))))
    return out


def open_store(
    entry: Any,
    data: Any,
    tokenizer: Tokenizer | None,
    vocab_size: int,
    num_virtual: int,
    key: str,
    objective: str = "sft",
    context: int | None = None,
) -> TokenStore | SharedStore:
    """Returns the tokenised source of one entry of `data.train` or `data.eval`.

    With `data.packing` the completions of a prompt share it; the pairs of an objective that learns
    from unpaired examples are split. `context` is as for `data.store.tokenize`.

    Raises:
        RequestError: with the key, and FILE:LINE of the record at fault.
    """
    if tokenizer is None and entry.format != "tokens":
        raise RequestError(
            f"format {entry.format!r} needs a tokenizer; set model.tokenizer", key=f"{key}.format"
        )
    count = jax.process_count()
    return tokenize_shared(
        open_source(entry.source, key=f"{key}.source", lazily=count > 1),
        entry.format,
        tokenizer,
        count=count,
        index=jax.process_index(),
        seq_len=data.seq_len,
        overlong=data.overlong,
        num_virtual=num_virtual,
        vocab_size=vocab_size,
        key=key,
        shared=data.packing,
        split_pairs=splits_pairs(objective, entry.format),
        context=context,
    )


def formats_of(config: Any) -> list[str]:
    """Returns the formats of a config's data as they are trained: split pairs are unpaired."""
    name = config.objective.name
    return [
        "unpaired" if splits_pairs(name, entry.format) else entry.format
        for entry in (*config.data.train, *config.data.eval)
    ]


def batch_keys(config: Any) -> tuple[str, ...]:
    """Returns the batch keys beside those of every batch, as the formats of a config say."""
    formats, packing = formats_of(config)[: len(config.data.train)], config.data.packing
    return tuple(dict.fromkeys(key for format in formats for key in keys_of(format, packing)))


def branched(config: Any) -> bool:
    """Tells whether rows of a config's data hold completions of a prompt side by side."""
    return any(format in BRANCHED for format in formats_of(config))


def positions_left(config: ModelConfig, method: Method) -> int:
    """Returns how many positions a text may have, a method's virtual tokens included."""
    return config.max_context - method.position_offset


def open_data(
    config: Any,
    tokenizer: Tokenizer | None,
    vocab_size: int,
    num_virtual: int,
    context: int | None = None,
) -> Data:
    """Returns the Data of a resolved config; `context` is as for `data.store.tokenize`.

    Raises:
        RequestError: see `open_store`; also a source in which nothing is left to train on.
    """
    data, name = config.data, config.objective.name
    stores = [
        open_store(
            entry, data, tokenizer, vocab_size, num_virtual, f"data.train[{i}]", name, context
        )
        for i, entry in enumerate(data.train)
    ]
    evals = {
        entry.name: open_store(
            entry, data, tokenizer, vocab_size, num_virtual, f"data.eval[{i}]", name, context
        )
        for i, entry in enumerate(data.eval)
    }
    parts = {
        entry.name: {
            value: part.chosen
            for value, part in parts_of(evals[entry.name], entry.by, f"data.eval[{i}].by").items()
        }
        for i, entry in enumerate(data.eval)
        if entry.by is not None
    }
    for i, store in enumerate(stores):
        if len(store) == 0:
            raise RequestError("no example is left", key=f"data.train[{i}]")
    stream = Stream(
        stores,
        [entry.weight for entry in data.train],
        seq_len=data.seq_len,
        packing=data.packing,
        shuffle=data.shuffle,
        seed=config.seed,
        num_virtual=num_virtual,
    )
    duration = {name: config[name] for name in DURATIONS if name in config}
    budget = stream.budget(batch_size=config.batch_size, **duration)
    return Data(stream, budget, warmup_steps(config, stream, budget), evals, parts=parts)


def warmup_steps(config: Any, stream: Stream, budget: Budget) -> int:
    """Returns the warm-up in steps, whatever its unit in the config."""
    given = {name: value for name, value in config.optim.items() if name.startswith("warmup_")}
    if not given:
        return 0
    ((name, value),) = given.items()
    unit = name.removeprefix("warmup_")
    if unit == "ratio":
        return round(value * budget.steps)
    if unit == "steps" or value == 0:
        return int(value)
    return stream.steps(batch_size=config.batch_size, **{f"total_{unit}": value})
