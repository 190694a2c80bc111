"""What a run retains: the loss on data that it is not trained on, against its start."""

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
from jaxtune.evaluate.loss import Sums, loss_sums
from jaxtune.parallel.batches import Rows, held_rows
from jaxtune.parallel.mesh import batch_shards
from jaxtune.parallel.processes import is_writer
from jaxtune.recipes.assemble import TEACHER, Parts
from jaxtune.recipes.data import open_store, positions_left
from jaxtune.recipes.fisher import diagonal
from jaxtune.recipes.sft import sft_loss
from jaxtune.training.compile import Layout, jit_evaluation
from jaxtune.training.step import Batch, SumLoss
from jaxtune.training.workdir import read_json, write_json

FILE = "retention.json"  # in the workdir: what was measured before the first step
NLL, RISE = "retention/nll", "retention/nll_rise"
Metrics = dict[str, float]


@dataclasses.dataclass(frozen=True)
class Retention:
    """What a run measures of what it retains.

    Attributes:
        settings: the resolved config.
        layout: where the parameters lie.
        num_virtual: prompt-tuning slots before each example.
        stores: {name: tokenised source}.
        loss: the next-token loss.
        evaluation: the same, jitted: (trainable, frozen, batch) → sums.
    """

    settings: Any
    layout: Layout
    num_virtual: int
    stores: dict[str, TokenStore | SharedStore]
    loss: SumLoss
    evaluation: Callable

    @property
    def rows(self) -> Rows | None:
        """Which rows of each batch this process holds; None: all."""
        size, length = self.settings.eval.batch_size, self.settings.data.seq_len
        return held_rows(size, length, self.layout.mesh)

    def batches(self, store: TokenStore | SharedStore) -> Iterator[dict[str, np.ndarray]]:
        """Yields the examples of a source, one a row."""
        size, length = self.settings.eval.batch_size, self.settings.data.seq_len
        chosen = slice(None) if self.rows is None else self.rows.held
        return eval_batches(store, size, length, self.num_virtual, chosen)

    def measure(self, trainable: Tree, frozen: Tree) -> Metrics:
        """Returns `retention/nll`, nats a token over all sources, and that of each of several."""
        mesh = self.layout.mesh
        found = {
            name: loss_sums(
                self.evaluation, trainable, frozen, self.batches(store), mesh, self.rows
            )
            for name, store in self.stores.items()
        }
        whole = functools.reduce(Sums.__add__, found.values())
        named = {f"retention/{n}/nll": s.means()["loss"] for n, s in found.items()}
        return {NLL: whole.means()["loss"]} | (named if len(named) > 1 else {})

    def fingerprint(self) -> str:
        """Returns a hash of the data."""
        told = " ".join(f"{name}:{store.fingerprint()}" for name, store in self.stores.items())
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
        rise, bound = metrics.get(RISE), self.settings.retention.max_rise
        if bound is None or rise is None or rise <= bound:
            return None
        return f"{NLL} rose by {rise:.4g}, more than retention.max_rise = {bound:g}"


def open_retention(config: Any, parts: Parts, layout: Layout, tokenizer: Any) -> Retention | None:
    """Returns the Retention of a resolved config; None where nothing is to be measured.

    Raises:
        RequestError: see `recipes.data.open_store`.
    """
    if not config.retention.data:
        return None
    stores = {
        entry.name: open_store(
            entry,
            config.data,
            tokenizer,
            parts.config.vocab_size,
            parts.method.num_virtual,
            f"retention.data[{i}]",
            context=positions_left(parts.config, parts.method),
        )
        for i, entry in enumerate(config.retention.data)
    }
    alone = sft_loss(parts.config, parts.method, batch_shards(layout.mesh))

    def loss(trainable: Tree, frozen: Tree, batch: Batch, key: jax.Array | None) -> Any:
        student = {node: leaves for node, leaves in frozen.items() if node != TEACHER}
        return alone(trainable, student, batch, key)

    evaluation = jit_evaluation(lambda t, f, batch: loss(t, f, batch, None), layout)
    return Retention(config, layout, parts.method.num_virtual, stores, loss, evaluation)


def begin(
    retention: Retention, workdir: Path, step: int, measure: Callable[[], Metrics]
) -> tuple[Metrics, bool]:
    """Returns (what was measured before the first step, whether that was now).

    Args:
        retention: what is measured.
        workdir: keeps the measurement in `retention.json`.
        step: steps done.
        measure: measures the parameters as they are.

    Raises:
        RequestError: the run is past its start and the file is gone, or of other data.
    """
    path = workdir / FILE
    known = read_json(path) if path.is_file() else {}
    if known.get("data") == retention.fingerprint():
        return known["before"], False
    if step:
        raise RequestError(
            "the loss before the run is not known for this retention.data: it was measured at the "
            "start only; restore the data, or begin in another --workdir",
            key="retention.data",
            where=path,
        )
    before = measure()
    if is_writer():
        write_json(path, {"data": retention.fingerprint(), "before": before})
    return before, True


def against(before: Metrics, now: Metrics) -> Metrics:
    """Returns the metrics with the rise of each loss.

    >>> against({"retention/nll": 1.0}, {"retention/nll": 1.5})
    {'retention/nll': 1.5, 'retention/nll_rise': 0.5}
    """
    return now | {f"{name}_rise": value - before[name] for name, value in now.items()}
