"""Old data beside what an objective learns from: rows of its own in each step, terms of its own.

InstructGPT's PPO-ptx adds the next-token loss on pretraining data to the policy's loss (Ouyang et
al. 2022, arXiv:2203.02155, equation 2). Here every objective that trains logits can have it, and
the KL from the base at the same targets: neither knows of the other. The rows follow from the step
alone, so that a run that goes on needs nothing saved of them.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from jaxtune.core.errors import RequestError
from jaxtune.core.tree import Tree
from jaxtune.core.weighted import Weighted
from jaxtune.data.batches import Batch, empty_batch
from jaxtune.data.stream import Stream
from jaxtune.parallel.batches import held_rows
from jaxtune.peft.method import Method
from jaxtune.recipes.assemble import Parts
from jaxtune.recipes.base import Base
from jaxtune.recipes.data import Data, open_store, positions_left
from jaxtune.recipes.retention.keep import NAME, REPLAY_KL, keep_of
from jaxtune.recipes.retention.measured import without_teacher
from jaxtune.recipes.sft import TERM, sft_loss
from jaxtune.training.feed import Source
from jaxtune.training.state import TrainState
from jaxtune.training.step import Loss, Metrics, SumLoss

REPLAY = "replay"  # the batch's entry with the replayed rows, and the term of their loss
NLL = "replay_nll"  # metric: nats a token on them
_OWN_KEY = 0x7265706C  # of the dropout keys


def replayed_rows(config: Any) -> int:
    """Returns how many rows a step of a resolved config replays; 0: it replays nothing."""
    return config.retention.replay_batch_size if config.retention.replay_data else 0


def with_replay(data: Data, config: Any, base: Base, method: Method) -> Data:
    """Returns the data of a run with the rows that it replays, if any.

    Raises:
        RequestError: see `recipes.data.open_store`; also a source in which nothing is left.
    """
    entries = config.retention.replay_data
    if not entries:
        return data
    stores = []
    for i, entry in enumerate(entries):
        key = f"retention.replay_data[{i}]"
        store = open_store(
            entry,
            config.data,
            base.tokenizer,
            base.config.vocab_size,
            method.num_virtual,
            key,
            context=positions_left(base.config, method),
        )
        if len(store) == 0:
            raise RequestError("no example is left", key=key)
        stores.append(store)
    stream = Stream(
        stores,
        [entry.weight for entry in entries],
        seq_len=config.data.seq_len,
        packing=config.data.packing,
        shuffle=config.data.shuffle,
        seed=config.seed,
        num_virtual=method.num_virtual,
    )
    return dataclasses.replace(data, replay=stream)


def padding(config: Any, num_virtual: int) -> Batch:
    """Returns one row of padding with the keys of replayed rows, arrays [1, T]."""
    return empty_batch(1, config.data.seq_len, num_virtual)


def with_terms(loss: SumLoss, term: str, config: Any, parts: Parts, shards: int) -> SumLoss:
    """Returns the loss with the terms of the replayed rows; as it is where nothing is replayed.

    They are `retention.replay` times the mean NLL a token, and `retention.replay_kl` times the
    mean KL from the base, both over the replayed targets of the whole batch.

    Args:
        loss: of the objective, which sees its own rows alone.
        term: what it is called where it has one term.
        config: resolved.
        parts: the model.
        shards: over how many devices the rows of a batch are spread.

    Raises:
        RequestError: see `keep.keep_of`.
    """
    if not replayed_rows(config):
        return loss
    strength, keep = config.retention.replay, keep_of(config, parts, shards, REPLAY_KL)
    replayed = without_teacher(sft_loss(parts.config, parts.method, shards, keep=keep))

    def sum_loss(
        trainable: Tree, frozen: Tree, batch: dict[str, Any], key: jax.Array | None
    ) -> tuple[Loss, Metrics]:
        own = {name: array for name, array in batch.items() if name != REPLAY}
        found, metrics = loss(trainable, frozen, own, key)
        losses = {term: found} if isinstance(found, Weighted) else dict(found)
        apart = None if key is None else jax.random.fold_in(key, _OWN_KEY)
        old, _ = replayed(trainable, frozen, batch[REPLAY], apart)
        nll = old if isinstance(old, Weighted) else old[TERM]
        if strength:
            losses[REPLAY] = Weighted(strength * nll.sum, nll.weight)
        if keep is not None:
            losses[REPLAY_KL] = old[NAME]
        return losses, metrics | {NLL: jax.lax.stop_gradient(nll)}

    return sum_loss


def with_rows(source: Source, plan: Any, start: int) -> Source:
    """Returns the source whose batches hold the replayed rows too, those of their step.

    Args:
        source: of the objective.
        plan: of the run.
        start: the first step.
    """
    size = replayed_rows(plan.config)
    if not size:
        return source
    rows = held_rows(size, plan.config.data.seq_len, plan.mesh)
    batches = plan.data.replay.batches(
        size,
        plan.data.budget.steps,
        start=start,
        rows=slice(None) if rows is None else rows.held,
    )

    def feed(state: TrainState) -> tuple[dict[str, Any], dict[str, float]]:
        batch, told = source.feed(state)
        return batch | {REPLAY: next(batches)}, told

    return Source(feed, source.arrays)
