"""What a run retains of data and tasks that it is not trained on, against its start."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxtune.core.errors import RequestError
from jaxtune.core.tree import Tree
from jaxtune.data.batches import eval_batches
from jaxtune.data.shares import SharedStore
from jaxtune.data.token_store import TokenStore
from jaxtune.data.tokenizer import Tokenizer
from jaxtune.evaluate.loss import Sums, loss_sums
from jaxtune.parallel.batches import Rows, held_rows
from jaxtune.parallel.mesh import batch_shards
from jaxtune.parallel.processes import is_writer
from jaxtune.recipes.assemble import TEACHER, Parts
from jaxtune.recipes.data import open_store, positions_left
from jaxtune.recipes.live import live_model
from jaxtune.recipes.reference import adapters_off
from jaxtune.recipes.retention.fisher import diagonal
from jaxtune.recipes.retention.kl import KL as KL_OF_TEXT
from jaxtune.recipes.retention.kl import loss_with_kl, tops_of
from jaxtune.recipes.retention.tasks import Hits, Task, accuracies, drops, open_tasks
from jaxtune.recipes.schema.retention import METRICS_OF
from jaxtune.recipes.sft import sft_loss
from jaxtune.recipes.teacher_data import ROWS, TopK
from jaxtune.recipes.workdir import RETAINED
from jaxtune.training.compile import Layout, jit_evaluation
from jaxtune.training.step import Batch, SumLoss
from jaxtune.training.workdir import read_json, write_json

NLL, RISE = "retention/nll", "retention/nll_rise"
Metrics = dict[str, float]


@dataclasses.dataclass(frozen=True)
class Kept:
    """What was measured of what a run retains, at one moment.

    Attributes:
        metrics: `retention/nll`, `retention/kl`, `retention/accuracy`, as far as they are asked
            for, and those of each of several sources.
        hits: {task: float64 [examples], 1 where the model was right}.
    """

    metrics: Metrics
    hits: Hits = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Retention:
    """What a run measures of what it retains.

    Attributes:
        settings: the resolved config.
        parts: the model.
        layout: where the parameters lie.
        tokenizer: of the run.
        stores: {name: tokenised source}.
        tasks: {name: task}.
        loss: the next-token loss.
        evaluation: the same, jitted, with the KL where it is asked for: (trainable, frozen, batch)
            → sums.
        tops: where the KL is that of the start's likeliest tokens, what they are; see
            `kl`.
        numbered: {name: source that numbers the entries of `tops`}.
    """

    settings: Any
    parts: Parts
    layout: Layout
    tokenizer: Tokenizer | None
    stores: dict[str, TokenStore | SharedStore]
    tasks: dict[str, Task]
    loss: SumLoss
    evaluation: Callable
    tops: TopK | None = None
    numbered: dict[str, TokenStore | SharedStore] = dataclasses.field(default_factory=dict)

    @property
    def rows(self) -> Rows | None:
        """Which rows of each batch this process holds; None: all."""
        size, length = self.settings.eval.batch_size, self.settings.data.seq_len
        return held_rows(size, length, self.layout.mesh)

    def batches(self, store: TokenStore | SharedStore) -> Iterator[dict[str, np.ndarray]]:
        """Yields the examples of a source, one a row."""
        size, length = self.settings.eval.batch_size, self.settings.data.seq_len
        chosen = slice(None) if self.rows is None else self.rows.held
        return eval_batches(store, size, length, self.parts.method.num_virtual, chosen)

    def measure(self, trainable: Tree, frozen: Tree) -> Kept:
        """Returns what is kept: of text nats a token over all sources, of tasks the accuracy."""
        metrics: Metrics = {}
        if self.stores:
            found = {name: self.text(name, trainable, frozen) for name in self.stores}
            whole = functools.reduce(Sums.__add__, found.values())
            metrics = text_metrics("", whole)
            for name, own in found.items() if len(found) > 1 else ():
                metrics |= text_metrics(f"{name}/", own)
        if not self.tasks:
            return Kept(metrics)
        lm = live_model(self.tokenizer, self.parts, self.layout.mesh, trainable, frozen)
        size, most = self.settings.eval.batch_size, self.settings.eval.max_new_tokens
        hits = {name: task.hits(lm, most, size) for name, task in self.tasks.items()}
        return Kept(metrics | accuracies(hits), hits)

    def text(self, name: str, trainable: Tree, frozen: Tree) -> Sums:
        """Returns the sums over one source."""
        batches = self.batches(self.numbered.get(name, self.stores[name]))
        if self.tops is not None:
            batches = map(self.tops.put, batches)
        return loss_sums(self.evaluation, trainable, frozen, batches, self.layout.mesh, self.rows)

    def with_start(self, start: Callable[[], tuple[Tree, Tree]]) -> Retention:
        """Returns what can be measured against the start of the run.

        Args:
            start: gives the parameters at step 0; called only if they are needed.
        """
        if not (self.settings.retention.measure_kl and self.needs_tops):
            return self
        size, length = self.settings.eval.batch_size, self.settings.data.seq_len
        stores = list(self.stores.values())
        tops, flats = tops_of(self.parts, self.layout, stores, size, length, start())
        pairs = zip(self.stores.items(), flats, strict=True)
        numbered = {name: store.with_column(ROWS, flat) for (name, store), flat in pairs}
        return dataclasses.replace(self, tops=tops, numbered=numbered)

    @property
    def needs_tops(self) -> bool:
        """Whether the start of the run is not the base of its parameters."""
        return not adapters_off(self.parts, self.settings.peft.get("init_from"))

    def fingerprint(self) -> str:
        """Returns a hash of the data."""
        told = " ".join(f"{name}:{store.fingerprint()}" for name, store in self.stores.items())
        told += "".join(f" task {name}:{task.fingerprint()}" for name, task in self.tasks.items())
        return hashlib.blake2b(told.encode(), digest_size=16).hexdigest()

    def importance(self, trainable: Tree, frozen: Tree) -> Tree:
        """Returns the Fisher information of the trained parameters on the first examples."""
        left, heads = self.settings.retention.ewc_examples, []
        for store in self.stores.values():
            heads.append(store.head(min(left, len(store))))
            left -= len(heads[-1])
        batches = itertools.chain.from_iterable(map(self.batches, heads))
        count = sum(map(len, heads))
        return diagonal(self.loss, self.layout, trainable, frozen, batches, self.rows, count)

    def gate(self, metrics: Metrics) -> str | None:
        """Returns why a run with these metrics may not go on, or None."""
        for key, name in METRICS_OF.items():
            value, bound = metrics.get(name), self.settings.retention[key]
            if bound is not None and value is not None and not value <= bound:
                verb = f"{NLL} rose by" if name == RISE else f"{name} is"
                return f"{verb} {value:.4g}, more than retention.{key} = {bound:g}"
        return None


def text_metrics(name: str, found: Sums) -> Metrics:
    """Returns the metrics of a source, or of all under the name ""."""
    means = found.means()
    kl = {f"retention/{name}kl": means[KL_OF_TEXT]} if KL_OF_TEXT in means else {}
    return {f"retention/{name}nll": means["loss"]} | kl


def open_retention(config: Any, parts: Parts, layout: Layout, tokenizer: Any) -> Retention | None:
    """Returns the Retention of a resolved config; None where nothing is to be measured.

    Raises:
        RequestError: see `recipes.data.open_store`.
    """
    settings = config.retention
    if not (settings.data or settings.tasks):
        return None
    virtual = parts.method.num_virtual
    stores = {
        entry.name: open_store(
            entry,
            config.data,
            tokenizer,
            parts.config.vocab_size,
            virtual,
            f"retention.data[{i}]",
            context=positions_left(parts.config, parts.method),
        )
        for i, entry in enumerate(settings.data)
    }
    shards = batch_shards(layout.mesh)
    loss = without_teacher(sft_loss(parts.config, parts.method, shards))
    measured = loss
    if settings.measure_kl:
        whole = adapters_off(parts, config.peft.get("init_from"))
        measured = without_teacher(loss_with_kl(parts, shards, whole))
    evaluation = jit_evaluation(lambda t, f, batch: measured(t, f, batch, None), layout)
    tasks = open_tasks(config, tokenizer, virtual)
    return Retention(config, parts, layout, tokenizer, stores, tasks, loss, evaluation)


def without_teacher(loss: SumLoss) -> SumLoss:
    """Returns a loss that is given a teacher's parameters too, and leaves them out."""

    def own(trainable: Tree, frozen: Tree, batch: Batch, key: jax.Array | None) -> Any:
        student = {node: leaves for node, leaves in frozen.items() if node != TEACHER}
        return loss(trainable, student, batch, key)

    return own


def begin(
    retention: Retention, workdir: Path, step: int, measure: Callable[[], Kept]
) -> tuple[Kept, bool]:
    """Returns (what was measured before the first step, whether that was now).

    Args:
        retention: what is measured.
        workdir: keeps the measurement in `retention.json`.
        step: steps done.
        measure: measures the parameters as they are.

    Raises:
        RequestError: the run is past its start and the file is gone, or of other data.
    """
    path = workdir / RETAINED
    known = read_json(path) if path.is_file() else {}
    if known.get("data") == retention.fingerprint():
        hits = {name: np.array(own, np.float64) for name, own in known.get("hits", {}).items()}
        return Kept(known["before"], hits), False
    if step:
        raise RequestError(
            "what the run retained before its start is not known for this retention.data and "
            "retention.tasks: it was measured then only; restore them, or begin in another "
            "--workdir",
            key="retention.data",
            where=path,
        )
    before = measure()
    if is_writer():
        hits = {name: own.astype(int).tolist() for name, own in before.hits.items()}
        told = {"data": retention.fingerprint(), "before": before.metrics}
        write_json(path, told | ({"hits": hits} if hits else {}))
    return before, True


def against(before: Kept, now: Kept) -> Metrics:
    """Returns the metrics with the rise of each loss and the drop of each accuracy.

    >>> against(Kept({"retention/nll": 1.0}), Kept({"retention/nll": 1.5}))
    {'retention/nll': 1.5, 'retention/nll_rise': 0.5}
    """
    old = before.metrics
    rises = {f"{n}_rise": v - old[n] for n, v in now.metrics.items() if n.endswith("/nll")}
    return now.metrics | rises | (drops(before.hits, now.hits) if now.hits else {})
