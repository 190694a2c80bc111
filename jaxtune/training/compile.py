"""Step functions with their shardings, compiled for a mesh."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding

from jaxtune.core.tree import Tree, flatten, without_holes
from jaxtune.parallel.rules import batch_sharding, replicated, state_shardings
from jaxtune.training.state import TrainState, init_state


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where everything of a run lies.

    Attributes:
        mesh: the devices.
        state: NamedSharding of each leaf of the TrainState.
        frozen: NamedSharding of each frozen leaf.
        shapes: the TrainState's shapes, with these shardings.
    """

    mesh: Mesh
    state: TrainState
    frozen: Tree
    shapes: TrainState


def make_layout(
    trainable: Tree, frozen: Tree, params: Tree, tx: optax.GradientTransformation, mesh: Mesh
) -> Layout:
    """Returns the layout of a run.

    Args:
        trainable, frozen: shapes of the two partitions, None in each other's places.
        params: NamedSharding of each parameter.
        tx: the optimizer.
        mesh: the mesh.
    """
    shardings = flatten(params)

    def of(tree: Tree) -> Tree:
        return jax.tree_util.tree_map_with_path(
            lambda path, _: shardings["/".join(str(k.key) for k in path)], tree
        )

    shapes = jax.eval_shape(lambda t: init_state(t, tx, 0), trainable)
    known = {p: (s.shape, shardings[p]) for p, s in without_holes(trainable).items()}
    whole = replicated(mesh)
    state = TrainState(
        step=whole,
        trainable=of(trainable),
        opt_state=state_shardings(shapes.opt_state, known, mesh),
        key=whole,
    )
    return Layout(mesh, state, of(frozen), with_shardings(shapes, state))


def with_shardings(shapes: Any, shardings: Any) -> Any:
    """Returns ShapeDtypeStructs that carry their shardings."""
    return jax.tree.map(
        lambda s, d: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=d), shapes, shardings
    )


def jit_step(step: Callable, layout: Layout) -> Callable:
    """Returns the jitted step: explicit shardings in and out, the state donated."""
    return jax.jit(
        step,
        in_shardings=(layout.state, layout.frozen, batch_sharding(layout.mesh)),
        out_shardings=(layout.state, replicated(layout.mesh)),
        donate_argnums=0,
    )


def jit_evaluation(evaluate: Callable, layout: Layout) -> Callable:
    """Returns the jitted (trainable, frozen, batch) → sums."""
    return jax.jit(
        evaluate,
        in_shardings=(layout.state.trainable, layout.frozen, batch_sharding(layout.mesh)),
        out_shardings=replicated(layout.mesh),
    )


def fresh_state(
    trainable: Tree, tx: optax.GradientTransformation, seed: int, layout: Layout
) -> TrainState:
    """Returns the state at step 0, laid out on the mesh."""
    return jax.jit(
        lambda t: init_state(t, tx, seed),
        in_shardings=(layout.state.trainable,),
        out_shardings=layout.state,
    )(trainable)


def abstract_batch(
    batch_size: int,
    seq_len: int,
    keys: dict[str, np.dtype],
    sharding: NamedSharding,
    rest: Mapping[str, tuple[int, ...]] = MappingProxyType({}),
) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes of a batch, [B, T, …].

    Args:
        batch_size, seq_len: B and T.
        keys: dtype of each array.
        sharding: of all.
        rest: further axes, of the arrays that have some.
    """
    return {
        name: jax.ShapeDtypeStruct(
            (batch_size, seq_len, *rest.get(name, ())), dtype, sharding=sharding
        )
        for name, dtype in keys.items()
    }
