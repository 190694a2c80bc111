"""The one training step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxtune.core.tree import Tree
from jaxtune.core.weighted import Weighted, weighted
from jaxtune.optim.schedules import Schedule
from jaxtune.training.state import TrainState

Batch = dict[str, jax.Array]
Metrics = dict[str, Weighted]
BAD_LEAF = "bad_leaf"
# (trainable, frozen, batch, dropout key or None) → (loss as a sum with its weight, metrics)
SumLoss = Callable[[Tree, Tree, Batch, jax.Array | None], tuple[Weighted, Metrics]]


def micro_batches(batch: Batch, count: int) -> Batch:
    """Returns [count, B / count, ...] arrays; row i goes to micro-batch i mod count.

    Splitting the rows this way keeps each device's rows on it (no collective).
    """
    return jax.tree.map(lambda x: x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1), batch)


def summed_gradients(
    sum_loss: SumLoss, trainable: Tree, frozen: Tree, batch: Batch, key: jax.Array, count: int
) -> tuple[Weighted, Metrics, Tree]:
    """Returns (loss, metrics, Σ gradients) over `count` micro-batches, all undivided, float32.

    Dividing by the weight of the whole batch happens once, after the sum: the mean of the
    micro-batches' means is another loss (CORRECTNESS C1).
    """

    def grad(rows: Batch, key: jax.Array) -> tuple[Weighted, Metrics, Tree]:
        def scalar(trainable: Tree) -> tuple[jax.Array, tuple[Weighted, Metrics]]:
            loss, metrics = sum_loss(trainable, frozen, rows, key)
            return loss.sum, (loss, metrics)

        (_, (loss, metrics)), grads = jax.value_and_grad(scalar, has_aux=True)(trainable)
        return loss, metrics, jax.tree.map(lambda g: g.astype(jnp.float32), grads)

    if count == 1:
        return grad(batch, key)
    rows = micro_batches(batch, count)
    shapes = jax.eval_shape(grad, jax.tree.map(lambda x: x[0], rows), key)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

    def add(total: Any, piece: tuple[Batch, jax.Array]) -> tuple[Any, None]:
        part = grad(piece[0], jax.random.fold_in(key, piece[1]))
        return jax.tree.map(jnp.add, total, part), None

    return jax.lax.scan(add, zeros, (rows, jnp.arange(count)))[0]


def make_train_step(
    sum_loss: SumLoss,
    tx: optax.GradientTransformation,
    schedule: Schedule,
    grad_accum: int,
) -> Callable[[TrainState, Tree, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """Returns the pure function (state, frozen, batch) → (state, metrics), to be jitted.

    Args:
        sum_loss: the objective on a batch; see `SumLoss`.
        tx: updates of the trained partition.
        schedule: step → learning rate, for the metric.
        grad_accum: micro-batches to one step.

    The metrics are float32 scalars: `loss` and the objective's own as means over the global batch,
    `grad_norm` before clipping, `learning_rate`, `tokens` (not padding), `trained_tokens` (with a
    weight), `unchanged`, the share of trained elements that the update left as they were, and
    `BAD_LEAF`, which leaf of the trained partition has a gradient that is not finite, or -1.
    """

    def train_step(state: TrainState, frozen: Tree, batch: Batch):
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        loss, metrics, grads = summed_gradients(
            sum_loss, state.trainable, frozen, batch, key, grad_accum
        )
        weight = jnp.where(loss.weight == 0, 1.0, loss.weight)
        grads = jax.tree.map(lambda g: g / weight, grads)
        squares = jnp.stack([jnp.sum(g * g) for g in jax.tree.leaves(grads)])
        updates, opt_state = tx.update(grads, state.opt_state, state.trainable)
        trainable = optax.apply_updates(state.trainable, updates)

        new = TrainState(state.step + 1, trainable, opt_state, state.key)
        report = {name: value.mean() for name, value in metrics.items()}
        report |= {
            "loss": loss.mean(),
            "grad_norm": jnp.sqrt(jnp.sum(squares)),
            "learning_rate": schedule(state.step),
            "tokens": jnp.sum(batch["segment_ids"] > 0).astype(jnp.float32),
            "trained_tokens": jnp.sum(batch["loss_mask"] > 0).astype(jnp.float32),
            "unchanged": unchanged(state.trainable, trainable),
            BAD_LEAF: first_bad(squares),
        }
        return new, report

    return train_step


def first_bad(squares: jax.Array) -> jax.Array:
    """Returns the index of the first number that is not finite, or -1; float32."""
    ok = jnp.isfinite(squares)
    return jnp.where(jnp.all(ok), -1, jnp.argmin(ok)).astype(jnp.float32)


def unchanged(before: Tree, after: Tree) -> jax.Array:
    """Returns the share of elements that an update left bitwise alone (CORRECTNESS C19)."""
    same = jax.tree.map(lambda b, a: weighted(b == a, jnp.ones(b.shape)), before, after)
    pairs = jax.tree.leaves(same, is_leaf=lambda x: isinstance(x, Weighted))
    return sum(pairs[1:], pairs[0]).mean()
