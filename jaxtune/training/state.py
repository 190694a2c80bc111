"""What a training step carries from one step to the next."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxtune.core.tree import Tree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """The state of a run on the devices.

    Attributes:
        step: int32, optimizer steps done.
        trainable: the trained partition, None elsewhere; float32.
        opt_state: Optax state of that partition.
        key: random key of the run, uint32; a step folds its number into it.
    """

    step: jax.Array
    trainable: Tree
    opt_state: Any
    key: jax.Array


def init_state(trainable: Tree, tx: optax.GradientTransformation, seed: int) -> TrainState:
    """Returns the state at step 0."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        trainable=trainable,
        opt_state=tx.init(trainable),
        key=jax.random.key_data(jax.random.key(seed)),
    )
