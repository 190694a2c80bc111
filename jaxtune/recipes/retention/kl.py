"""How far a run's next-token distributions are from those of its start, on what is retained.

Where the base stays whole beside what is trained, it is computed in the same step, by the same
parameters without the additions. Elsewhere the TOP likeliest tokens of the model at its start are
kept from before the first step; with the rest as one more event, their KL is a lower bound.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from jaxtune.core.tree import Tree, combine
from jaxtune.core.weighted import Weighted, weighted
from jaxtune.data.batches import placed_batches
from jaxtune.models import decoder
from jaxtune.objectives.distill import forward_kl, top_k_divergences
from jaxtune.objectives.sft import next_token_loss
from jaxtune.parallel.batches import global_batch, held_rows
from jaxtune.parallel.rules import batch_sharding, replicated
from jaxtune.parallel.sequence import sequence_shards
from jaxtune.recipes.assemble import Parts
from jaxtune.recipes.retention.keep import from_base
from jaxtune.recipes.scores import most_likely, predictions
from jaxtune.recipes.teacher_data import IDS, LOGPROBS, Store, TopK, table_of
from jaxtune.training.compile import Layout
from jaxtune.training.step import Batch, SumLoss

KL = "kl"  # of the metrics
TOP = 64


def loss_with_kl(parts: Parts, shards: int, whole: bool) -> SumLoss:
    """Returns the next-token loss with the metric KL, KL(start‖model) at the targets.

    Args:
        parts: the model.
        shards: over how many devices the rows of a batch are spread.
        whole: whether the start is the base without what the method adds; if not, a batch has what
            `TopK.put` puts there.
    """
    config, method = parts.config, parts.method

    def sum_loss(
        trainable: Tree, frozen: Tree, batch: Batch, key: jax.Array | None
    ) -> tuple[Weighted, dict[str, Weighted]]:
        params = combine(trainable, decoder.with_gathered_head(config, frozen))
        found = predictions(config, method, params, batch, key, shards=shards)
        weights = found.batch["loss_mask"]
        loss, metrics = next_token_loss(found.scores, weights)
        if whole:
            apart = from_base(parts, params, batch, found, shards)
        else:
            apart = top_k_divergences(
                forward_kl,
                (functools.partial(decoder.logits, config, method, params), found.hidden),
                found.batch[IDS],
                found.batch[LOGPROBS],
                config.vocab_size,
                shards=shards,
                pieces=sequence_shards(),
            )
        return loss, metrics | {KL: weighted(apart, weights)}

    return sum_loss


def tops_of(
    parts: Parts,
    layout: Layout,
    stores: Sequence[Store],
    batch_size: int,
    seq_len: int,
    start: tuple[Tree, Tree],
) -> tuple[TopK, list[np.ndarray]]:
    """Returns the likeliest tokens of a model at the targets of sources; see `table_of`.

    Of several processes all compute all of them, since each needs any row.

    Args:
        parts, layout: the model, and where its parameters lie.
        stores: the sources.
        batch_size, seq_len: of a batch.
        start: (trained, the rest) of the parameters.
    """
    mesh, rows = layout.mesh, held_rows(batch_size, seq_len, layout.mesh)
    run = jitted(parts, layout)
    read = []
    for store in stores:
        ids, logprobs = [], []
        for batch, _ in placed_batches(store, batch_size, seq_len, parts.method.num_virtual):
            held = batch if rows is None else {n: a[list(rows.held)] for n, a in batch.items()}
            found = jax.device_get(run(*start, global_batch(held, mesh, rows)))
            targets = batch["loss_mask"] > 0
            ids.append(found[0][targets])
            logprobs.append(found[1][targets])
        read.append((np.concatenate(ids), np.concatenate(logprobs), store.fingerprint()))
    return table_of(stores, read)


def jitted(parts: Parts, layout: Layout) -> Callable[[Tree, Tree, Any], Any]:
    """Returns (trained, the rest, batch) → `most_likely` tokens of each place."""
    count = min(TOP, parts.config.vocab_size)

    def run(trainable: Tree, frozen: Tree, batch: Batch) -> tuple[jax.Array, jax.Array]:
        params = combine(trainable, decoder.with_gathered_head(parts.config, frozen))
        return most_likely(parts.config, parts.method, count, 1.0, params, batch)

    return jax.jit(
        run,
        in_shardings=(layout.state.trainable, layout.frozen, batch_sharding(layout.mesh)),
        out_shardings=replicated(layout.mesh),
    )
