"""Config → tokenised data."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from jaxtune.core.errors import RequestError
from jaxtune.data.batches import most_completions as most
from jaxtune.data.prompts import Prompts, PromptStore, read_prompts
from jaxtune.data.shares import SharedStore, tokenize_shared
from jaxtune.data.sources import open_source
from jaxtune.data.store import TokenStore, keys_of
from jaxtune.data.stream import Budget, Stream
from jaxtune.data.tokenizer import Tokenizer
from jaxtune.recipes.schema_formats import splits_pairs

DURATIONS = ("total_steps", "total_epochs", "total_examples", "total_tokens")


@dataclasses.dataclass(frozen=True)
class Data:
    """The data of a run.

    Attributes:
        stream: rows for training.
        budget: how many steps.
        warmup_steps: learning-rate warm-up in steps.
        evals: {name: tokenised held-out source}.
        mismatched: of an objective that needs them, prompts with completions of other prompts, in
            the order of `stream` and `evals`.
        teacher: what a teacher says of the targets, a `teacher_data.TopK`, where it is on disk.
    """

    stream: Stream
    budget: Budget
    warmup_steps: int
    evals: dict[str, TokenStore | SharedStore]
    mismatched: Data | None = None
    teacher: Any = None


def open_store(
    entry: Any,
    data: Any,
    tokenizer: Tokenizer | None,
    vocab_size: int,
    num_virtual: int,
    key: str,
    objective: str = "sft",
) -> TokenStore | SharedStore:
    """Returns the tokenised source of one entry of `data.train` or `data.eval`.

    With `data.packing` the completions of a prompt share it; the pairs of an objective that learns
    from unpaired examples are split.

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
    )


def most_completions(data: Data, seq_len: int, packing: bool, num_virtual: int) -> int:
    """Returns a number that the completions of a row of any of a run's batches never exceed.

    Rows of evaluation data hold one example, whatever the packing; see `batches.most_completions`.
    """
    held_out = most(tuple(data.evals.values()), seq_len, False, num_virtual)
    trained = 1 if data.stream is None else data.stream.most_completions
    return max(trained, held_out)


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


def open_data(config: Any, tokenizer: Tokenizer | None, vocab_size: int, num_virtual: int) -> Data:
    """Returns the Data of a resolved config.

    Raises:
        RequestError: see `open_store`; also a source in which nothing is left to train on.
    """
    data, name = config.data, config.objective.name
    stores = [
        open_store(entry, data, tokenizer, vocab_size, num_virtual, f"data.train[{i}]", name)
        for i, entry in enumerate(data.train)
    ]
    evals = {
        entry.name: open_store(
            entry, data, tokenizer, vocab_size, num_virtual, f"data.eval[{i}]", name
        )
        for i, entry in enumerate(data.eval)
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
    return Data(stream, budget, warmup_steps(config, stream, budget), evals)


def open_prompts(
    config: Any, tokenizer: Tokenizer, longest: int
) -> tuple[Prompts, dict[str, PromptStore]]:
    """Returns the prompts of a resolved config: for training, and {name: held-out source}.

    Args:
        config: with sources of format "prompt".
        tokenizer: the model's.
        longest: the most tokens of a prompt that leave room for a completion; `data.max_prompt`
            may say less.

    Raises:
        RequestError: with the key, and FILE:LINE of the record at fault.
    """
    data, most_tokens = config.data, config.data.get("max_prompt") or longest
    if most_tokens > longest:
        raise RequestError(
            f"{most_tokens} leaves no room for a completion: at most {longest} do",
            key="data.max_prompt",
        )

    def read(entry: Any, key: str) -> PromptStore:
        if tokenizer is None:
            raise RequestError("prompts need a tokenizer; set model.tokenizer", key=f"{key}.format")
        source = open_source(entry.source, key=f"{key}.source")
        return read_prompts(
            source, tokenizer, max_prompt=most_tokens, overlong=data.overlong, key=key
        )

    stores = tuple(read(entry, f"data.train[{i}]") for i, entry in enumerate(data.train))
    prompts = Prompts(
        stores,
        tuple(entry.weight for entry in data.train),
        shuffle=data.shuffle,
        seed=config.seed,
    )
    return prompts, {e.name: read(e, f"data.eval[{i}]") for i, e in enumerate(data.eval)}


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
