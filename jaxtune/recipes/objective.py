"""What an objective is to a run: its data, the batches made of them, their loss, its evaluation."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from rich.console import Console

from jaxtune.core.tree import Tree
from jaxtune.data.batches import Batch, empty_batch
from jaxtune.data.inspect import inspect
from jaxtune.peft.method import Method
from jaxtune.recipes import stream_feed
from jaxtune.recipes.assemble import Parts
from jaxtune.recipes.base import Base
from jaxtune.recipes.data import Data, batch_keys, open_data, positions_left
from jaxtune.recipes.evaluation import held_out
from jaxtune.recipes.rows import Rows
from jaxtune.training.feed import Source
from jaxtune.training.step import SumLoss

# (resolved config, the model's partitions, what is known of the rows) → loss
MakeLoss = Callable[[Any, Parts, Rows], SumLoss]


def tokenised(config: Any, base: Base, method: Method) -> Data:
    """Returns the examples of `data.train` and `data.eval`, tokenised."""
    size, context = base.config.vocab_size, positions_left(base.config, method)
    return open_data(config, base.tokenizer, size, method.num_virtual, context)


def token_rows(config: Any, data: Data, rows: int, num_virtual: int) -> Batch:
    """Returns a batch of padding [rows, data.seq_len] with the keys that the examples give it."""
    # A planned run may have no data here.
    keys = batch_keys(config) if data.stream is None else data.stream.keys
    return empty_batch(rows, config.data.seq_len, num_virtual, keys)


def targets_alone(_: Any, rows: Rows) -> int | None:
    """Returns how many tokens of a row the head runs on where it runs on targets."""
    return rows.targets


def show_rows(plan: Any, count: int, console: Console) -> None:
    """Prints the first rows as they are trained, and counts of the data."""
    inspect(plan.data.stream, plan.base.tokenizer, count, console)


@dataclasses.dataclass(frozen=True)
class Objective:
    """One entry of `objectives.OBJECTIVES`.

    Attributes:
        trained: what training minimises.
        held_out: what evaluation measures on a batch; None where it measures no loss.
        term: what its own term is called where its loss has several.
        likelihood: whether the held-out loss is nats a token, so that it has a perplexity.
        open_data: (resolved config, base, method) → the data of a run.
        open_feed: (plan, the run as it begins, note) → where its batches come from; `note` takes
            rows of `samples.jsonl`.
        evaluate: (plan, trainable, frozen) → the `eval/…` metrics.
        padding: (resolved config, its data, rows, virtual tokens) → a batch of padding with all
            the keys that its feed gives it.
        show: (plan, how many, console) → None, prints the first things that are learned from.
        metrics: (plan) → names of metrics beside the step's: of the feed and of evaluations.
        keeps_start: whether a run of the resolved config needs a copy of the trained parameters
            as they were before the first step.
        at_start: of an objective with a reference, which is the policy at step 0: resolved
            `objective` section → the preference loss where both are one, None where the data
            decide it; see `recipes.reference`.
        head_tokens: (resolved config, what is known of the rows) → of how many tokens of a row its
            loss makes logits; None: of all, or not known.
    """

    trained: MakeLoss
    held_out: MakeLoss | None
    term: str
    likelihood: bool
    open_data: Callable[[Any, Base, Method], Data] = tokenised
    open_feed: Callable[[Any, Any, Callable[[dict[str, Any]], None]], Source] = (
        stream_feed.open_feed
    )
    evaluate: Callable[[Any, Tree, Tree], dict[str, float]] = held_out.evaluate
    padding: Callable[[Any, Data, int, int], Batch] = token_rows
    show: Callable[[Any, int, Console], None] = show_rows
    metrics: Callable[[Any], set[str]] = held_out.names
    keeps_start: Callable[[Any], bool] = lambda _: False
    at_start: Callable[[Any], float | None] | None = None
    head_tokens: Callable[[Any, Rows], int | None] = lambda *_: None
