"""A model against another on the same examples: what it forgot, and how sure that is."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.core.errors import RequestError
from jaxtune.core.tree import Tree
from jaxtune.data.batches import eval_batches
from jaxtune.data.shares import SharedStore
from jaxtune.data.token_store import TokenStore
from jaxtune.evaluate.bootstrap import mean_of, paired
from jaxtune.models import decoder
from jaxtune.objectives.distill import forward_kl, token_divergences
from jaxtune.parallel.batches import global_batch
from jaxtune.parallel.mesh import batch_shards
from jaxtune.parallel.rules import constrain
from jaxtune.recipes.language_model import LanguageModel
from jaxtune.recipes.scores import Predictions, predictions


def compare(
    lm: LanguageModel, base: LanguageModel, stores: dict[str, Any], batch_size: int
) -> dict[str, float]:
    """Returns how a model differs from another, nats a target token.

    "loss" is the other's, "rise" ours − theirs with the ends "low" and "high" of its 95 % interval
    by paired bootstrap over the examples, and "kl" the mean KL(theirs‖ours) of the next token.

    Args:
        lm, base: the models; their tokens are the same.
        stores: {name: source}, tokenised.
        batch_size: rows at a time.

    Raises:
        RequestError: the models do not read the same tokens.
    """
    if not comparable(lm, base):
        raise RequestError(
            "must have the same vocabulary, and the model no virtual tokens, to be compared token "
            "by token",
            key="--against",
        )
    parts = [measured(lm, base, store, batch_size) for store in stores.values()]
    ours, theirs, apart, weights = (np.concatenate(column) for column in zip(*parts, strict=True))
    found = paired(mean_of(ours, weights), mean_of(theirs, weights))
    total = weights.sum()
    return {
        "loss": float(theirs.sum() / total),
        "rise": found.value,
        "low": found.low,
        "high": found.high,
        "kl": float(apart.sum() / total),
    }


def comparable(lm: LanguageModel, base: LanguageModel) -> bool:
    """Tells whether two models can be compared token by token."""
    return lm.config.vocab_size == base.config.vocab_size and not lm.method.num_virtual


def measured(
    lm: LanguageModel, base: LanguageModel, store: TokenStore | SharedStore, batch_size: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Returns (Σ NLL ours, Σ NLL theirs, Σ KL, Σ weights) of each example, float64 [N]."""
    shards = batch_shards(lm.mesh)
    size = -(-batch_size // shards) * shards
    width = -(-int(store.room(0).max()) // 32) * 32

    @jax.jit
    def sums(ours: Tree, theirs: Tree, batch: dict[str, jax.Array]):
        a = predictions(lm.config, lm.method, ours, batch, shards=shards)
        b = predictions(base.config, base.method, theirs, batch, shards=shards)
        heads = [
            (functools.partial(decoder.logits, model.config, model.method, params), found.hidden)
            for model, params, found in ((lm, ours, a), (base, theirs, b))
        ]
        apart = token_divergences(forward_kl, *heads, lm.config.vocab_size, shards=shards)
        weights = a.batch["loss_mask"]
        found = [jnp.sum(x * weights, axis=1) for x in (nll(a), nll(b), apart, 0 * apart + 1.0)]
        return [constrain(x, None) for x in found]  # every process reads all of them

    found = []
    with jax.set_mesh(lm.mesh):
        for host in eval_batches(store, size, width):
            batch = global_batch(host, lm.mesh)
            found.append(jax.device_get(sums(lm.params, base.params, batch)))
    columns = [np.concatenate(column)[: len(store)] for column in zip(*found, strict=True)]
    return tuple(column.astype(np.float64) for column in columns)


def nll(found: Predictions) -> jax.Array:
    """Returns −log p [B, T] of the targets; 0 where there is none."""
    return jnp.where(found.batch["loss_mask"] > 0, -found.scores.logprobs, 0.0)
