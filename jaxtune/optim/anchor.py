"""A pull of the trained parameters towards where they started: L2-SP and EWC.

Both are quadratic penalties on parameters alone. Their gradient is added here, to the mean gradient
of the global batch, so that they combine with every objective and method, and micro-batches cannot
change them.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxtune.core.tree import Tree


class AnchorState(NamedTuple):
    """What the pull needs to know; a checkpoint holds it with the rest of the optimizer's state.

    Attributes:
        start: the trained parameters before the first step.
        importance: of each element, for EWC; None without it.
    """

    start: Tree
    importance: Tree | None


def pull_to_start(l2sp: float, ewc: float) -> optax.GradientTransformation:
    """Returns the transformation that adds (l2sp + ewc · F) (θ − θ₀) to the gradient.

    The penalties are l2sp/2 ‖θ − θ₀‖² (Li et al. 2018, arXiv:1802.01483) and
    ewc/2 Σ F (θ − θ₀)², with F the diagonal of the Fisher information on what is to be retained
    (Kirkpatrick et al. 2017, arXiv:1612.00796). F is 0 until `with_importance` sets it.
    """

    def init(params: Tree) -> AnchorState:
        importance = jax.tree.map(jnp.zeros_like, params) if ewc else None
        return AnchorState(jax.tree.map(jnp.copy, params), importance)

    def update(updates: Tree, state: AnchorState, params: Tree) -> tuple[Tree, AnchorState]:
        def pulled(grad: jax.Array, now: jax.Array, start: jax.Array, *fisher: jax.Array):
            strength = l2sp + sum((ewc * f for f in fisher), start=jnp.zeros(()))
            return grad + strength * (now - start)

        rest = () if state.importance is None else (state.importance,)
        return jax.tree.map(pulled, updates, params, state.start, *rest), state

    return optax.GradientTransformation(init, update)


def with_importance(opt_state: Any, importance: Tree) -> Any:
    """Returns an optimizer state whose AnchorState holds the importance.

    Raises:
        ValueError: there is not exactly one AnchorState with a place for it.
    """
    places = [state for state in anchors(opt_state) if state.importance is not None]
    if len(places) != 1:
        raise ValueError(f"{len(places)} places for an importance")

    def put(state: Any) -> Any:
        return state._replace(importance=importance) if isinstance(state, AnchorState) else state

    return jax.tree.map(put, opt_state, is_leaf=lambda x: isinstance(x, AnchorState))


def anchors(opt_state: Any) -> list[AnchorState]:
    """Returns the AnchorStates of an optimizer state."""
    found = jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, AnchorState))
    return [state for state in found if isinstance(state, AnchorState)]


@dataclasses.dataclass(frozen=True)
class Pull:
    """Strengths of the pull; 0 is none."""

    l2sp: float = 0.0
    ewc: float = 0.0

    def __bool__(self) -> bool:
        return bool(self.l2sp or self.ewc)
