"""Long rows: the tokens of each row spread over the mesh's `sequence` axis."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import numpy as np
from jax.sharding import Mesh

from jaxtune.core.errors import RequestError
from jaxtune.parallel.mesh import SEQUENCE_AXIS
from jaxtune.parallel.rules import constrain


def sequence_shards() -> int:
    """Returns over how many devices the tokens of a row are spread on the mesh that is set."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else mesh.shape[SEQUENCE_AXIS]


def check_tokens(seq_len: int, mesh: Mesh) -> None:
    """Raises RequestError unless rows of `seq_len` tokens spread evenly over the mesh."""
    shards = mesh.shape[SEQUENCE_AXIS]
    if shards > 1 and seq_len % (2 * shards):
        raise RequestError(
            f"{seq_len} tokens do not split into two pieces for each of {shards} devices "
            f"(mesh.sequence); use a multiple of {2 * shards}",
            key="data.seq_len",
        )


def zigzag(tokens: int, shards: int) -> np.ndarray:
    """Returns which token stands at each place of a row, int [tokens].

    Of 2 · shards pieces, each device has one from the front and its mirror image from the back.
    Under a causal mask a token's work grows with its place, so that all have the same.

    >>> zigzag(8, 2).tolist()
    [0, 1, 6, 7, 2, 3, 4, 5]
    """
    pieces = np.arange(tokens).reshape(2 * shards, -1)
    pairs = [(i, 2 * shards - 1 - i) for i in range(shards)]
    return pieces[np.ravel(pairs)].reshape(-1)


def balanced(arrays: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Returns per-token arrays [B, T, …] with the tokens of each row in `zigzag` order.

    Attention reads segments and positions, not places, so everything behind the shift of targets
    may stand in any order. This is the only place that moves tokens; without a `sequence` axis
    nothing moves.
    """
    shards = sequence_shards()
    if shards == 1:
        return dict(arrays)

    def move(x: jax.Array) -> jax.Array:
        rest = (None,) * (x.ndim - 2)
        return constrain(x[:, zigzag(x.shape[1], shards)], "batch", "tokens", *rest)

    return {name: move(array) for name, array in arrays.items()}
