"""A push of LoRA's factors away from the subspaces that earlier adapters changed: O-LoRA.

The penalty is on parameters alone. Its gradient is added to the mean gradient of the global batch,
as that of `optim.anchor` is, so that it combines with every objective, and micro-batches cannot
change it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxtune.core.tree import Tree, flatten, unflatten


class OrthogonalState(NamedTuple):
    """What the push needs to know; a checkpoint holds it with the rest of the optimizer's state.

    Attributes:
        earlier: the earlier adapters' A [..., in, R], side by side, in the places of the new ones.
    """

    earlier: Tree


@dataclasses.dataclass(frozen=True)
class Push:
    """What is pushed away from; no strength is no push.

    Attributes:
        strength: λ.
        earlier: {path of an A: the earlier adapters' A [..., in, R], side by side}.
    """

    strength: float = 0.0
    earlier: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.strength)


def overlap(earlier: jax.Array, now: jax.Array) -> jax.Array:
    """Returns Σ (Aᵢᵀ A)², how far the columns of two A share directions: 0 if all are orthogonal.

    Args:
        earlier: [..., in, R].
        now: [..., in, r].
    """
    return jnp.sum(jnp.einsum("...ir,...is->...rs", earlier, now) ** 2)


def push_apart(push: Push) -> optax.GradientTransformation:
    """Returns the transformation that adds the gradient of λ Σ ‖Aᵢᵀ A‖² to that of each A.

    The sum is over the layers and the earlier adapters i (Wang et al. 2023, arXiv:2310.14152).
    Where no earlier adapter has an A, nothing is added.
    """

    def init(params: Tree) -> OrthogonalState:
        del params
        held = {path: jnp.asarray(leaf, jnp.float32) for path, leaf in push.earlier.items()}
        return OrthogonalState(unflatten(held))

    def update(updates: Tree, state: OrthogonalState, params: Tree) -> tuple[Tree, OrthogonalState]:
        earlier, now = flatten(state.earlier), flatten(params)
        pushed = {
            path: grad + push.strength * jax.grad(overlap, argnums=1)(earlier[path], now[path])
            if path in earlier
            else grad
            for path, grad in flatten(updates).items()
        }
        return unflatten(pushed), state

    return optax.GradientTransformation(init, update)
