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
# One term, or several by name: the loss is then the sum of their means. Weights depend on the batch
# alone, never on parameters.
Loss = Weighted | dict[str, Weighted]
# (trainable, frozen, batch, dropout key or None) → (loss as sums with their weights, metrics)
SumLoss = Callable[[Tree, Tree, Batch, jax.Array | None], tuple[Loss, Metrics]]


def micro_batches(batch: Batch, count: int) -> Batch:
    """Returns [count, B / count, ...] arrays; row i goes to micro-batch i mod count.

    Splitting the rows this way keeps each device's rows on it (no collective).
    """
    return jax.tree.map(lambda x: x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1), batch)


def terms(loss: Loss) -> dict[str, Weighted]:
    """Returns the terms of a loss by name; the only one of a plain loss is `loss`."""
    return {"loss": loss} if isinstance(loss, Weighted) else loss


def mean_loss(losses: dict[str, Weighted]) -> jax.Array:
    """Returns the sum of the terms' means."""
    return sum((term.mean() for term in losses.values()), start=jnp.zeros(()))


def summed_gradients(
    sum_loss: SumLoss, trainable: Tree, frozen: Tree, batch: Batch, key: jax.Array, count: int
) -> tuple[dict[str, Weighted], Metrics, Tree]:
    """Returns (terms, metrics, Σ gradients) over `count` micro-batches, all undivided, float32.

    Dividing by `unit_weight` in the whole batch happens once, after the sum: the mean of the
    micro-batches' means is another loss (CORRECTNESS C1). The other terms' gradients are summed in
    units of that weight, since they have weights of their own in the whole batch.
    """

    def grad(
        rows: Batch, key: jax.Array, units: dict[str, jax.Array] | None = None
    ) -> tuple[dict[str, Weighted], Metrics, Tree]:
        def scalar(trainable: Tree) -> tuple[jax.Array, tuple[dict[str, Weighted], Metrics]]:
            loss, metrics = sum_loss(trainable, frozen, rows, key)
            losses = terms(loss)
            per = units_of(losses) if units is None else units
            total = sum(per[name] * term.sum for name, term in losses.items())
            return total, (losses, metrics)

        (_, (losses, metrics)), grads = jax.value_and_grad(scalar, has_aux=True)(trainable)
        return losses, metrics, jax.tree.map(lambda g: g.astype(jnp.float32), grads)

    if count == 1:
        return grad(batch, key)
    rows = micro_batches(batch, count)
    shapes = jax.eval_shape(grad, jax.tree.map(lambda x: x[0], rows), key)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    units = None
    if len(shapes[0]) > 1:
        # Only the weights are used, so that XLA leaves the model out of this.
        units = units_of(terms(sum_loss(trainable, frozen, batch, key)[0]))

    def add(total: Any, piece: tuple[Batch, jax.Array]) -> tuple[Any, None]:
        part = grad(piece[0], jax.random.fold_in(key, piece[1]), units)
        return jax.tree.map(jnp.add, total, part), None

    return jax.lax.scan(add, zeros, (rows, jnp.arange(count)))[0]


def unit_weight(losses: dict[str, Weighted]) -> jax.Array:
    """Returns the weight that summed gradients are divided by: that of the first term by name.

    A dictionary comes out of JAX's transformations in the order of its names, so that the order in
    which it was written says nothing afterwards.
    """
    return divisor(losses[min(losses)].weight)


def units_of(losses: dict[str, Weighted]) -> dict[str, jax.Array | float]:
    """Returns `unit_weight` over the weight of each term; 1 for the term that it is of."""
    first, *others = sorted(losses)
    whole = unit_weight(losses)
    units = {name: jax.lax.stop_gradient(whole / divisor(losses[name].weight)) for name in others}
    return {first: 1.0} | units


def divisor(weight: jax.Array) -> jax.Array:
    """Returns the weight, and 1 where it is 0: a batch without targets has the sum 0."""
    return jnp.where(weight == 0, 1.0, weight)


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

    The metrics are float32 scalars: `loss`, its terms as `loss/NAME` where there are several, and
    the objective's own as means over the global batch, `grad_norm` before clipping,
    `learning_rate`, `tokens` (not padding), `trained_tokens` (with a weight), `unchanged`, the
    share of trained elements that the update left as they were, and `BAD_LEAF`, which leaf of the
    trained partition has a gradient that is not finite, or -1.
    """

    def train_step(state: TrainState, frozen: Tree, batch: Batch):
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        losses, metrics, grads = summed_gradients(
            sum_loss, state.trainable, frozen, batch, key, grad_accum
        )
        weight = unit_weight(losses)
        grads = jax.tree.map(lambda g: g / weight, grads)
        squares = jnp.stack([jnp.sum(g * g) for g in jax.tree.leaves(grads)])
        updates, opt_state = tx.update(grads, state.opt_state, state.trainable)
        trainable = optax.apply_updates(state.trainable, updates)

        new = TrainState(state.step + 1, trainable, opt_state, state.key)
        report = {name: value.mean() for name, value in metrics.items()}
        if len(losses) > 1:
            report |= {f"loss/{name}": term.mean() for name, term in losses.items()}
        report |= {
            "loss": mean_loss(losses),
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
