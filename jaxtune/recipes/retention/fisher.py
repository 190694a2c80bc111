"""How much each trained parameter matters to what a model retains: the Fisher information."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.core.tree import Tree
from jaxtune.parallel.batches import Rows, global_batch
from jaxtune.training.compile import Layout
from jaxtune.training.step import SumLoss, terms


def row_squares(sum_loss: SumLoss) -> Callable[[Tree, Tree, dict[str, jax.Array]], Tree]:
    """Returns (trainable, frozen, batch) → Σ over rows of (∇ Σ loss of the row)², elementwise.

    One row after the other: the square of a sum is not the sum of squares. An empty row adds 0.
    """

    def squares(trainable: Tree, frozen: Tree, batch: dict[str, jax.Array]) -> Tree:
        def one(total: Tree, row: dict[str, jax.Array]) -> tuple[Tree, None]:
            def scalar(trainable: Tree) -> jax.Array:
                single = jax.tree.map(lambda x: x[None], row)
                losses = terms(sum_loss(trainable, frozen, single, None)[0])
                return sum(term.sum for term in losses.values())

            grads = jax.grad(scalar)(trainable)
            return jax.tree.map(
                lambda t, g: t + jnp.square(g.astype(jnp.float32)), total, grads
            ), None

        return jax.lax.scan(one, jax.tree.map(jnp.zeros_like, trainable), batch)[0]

    return squares


def diagonal(
    sum_loss: SumLoss,
    layout: Layout,
    trainable: Tree,
    frozen: Tree,
    batches: Iterable[dict[str, np.ndarray]],
    rows: Rows | None,
    examples: int,
) -> Tree:
    """Returns the diagonal of the empirical Fisher information, float32, laid out as `trainable`.

    The mean over examples of (∂ log p(example) / ∂θ)², at the data's own tokens (Kirkpatrick et al.
    2017, arXiv:1612.00796).

    Args:
        sum_loss: the summed next-token loss.
        layout: where everything lies.
        trainable, frozen: the parameters.
        batches: host batches with one example a row.
        rows: which rows of each batch those hold; None: all.
        examples: how many there are.
    """
    add: Any = jax.jit(
        lambda total, t, f, batch: jax.tree.map(jnp.add, total, row_squares(sum_loss)(t, f, batch)),
        out_shardings=layout.state.trainable,
        donate_argnums=0,
    )
    total = jax.tree.map(jnp.zeros_like, trainable)
    for host in batches:
        total = add(total, trainable, frozen, global_batch(host, layout.mesh, rows))
    return jax.tree.map(lambda x: x / examples, total)
