"""Host batches to global arrays."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxtune.core.errors import RequestError
from jaxtune.parallel.mesh import BATCH_AXES, batch_shards
from jaxtune.parallel.rules import batch_sharding, replicated


def check_batch(batch_size: int, grad_accum: int, mesh: Mesh, key: str = "batch_size") -> None:
    """Raises RequestError unless every micro-batch spreads evenly over the mesh."""
    shards = batch_shards(mesh)
    if batch_size % (grad_accum * shards):
        raise RequestError(
            f"{batch_size} rows do not split into {grad_accum} micro-batches on {shards} shards "
            f"({' × '.join(BATCH_AXES)}); use a multiple of {grad_accum * shards}, or set "
            "config.mesh",
            key=key,
        )


@dataclasses.dataclass(frozen=True)
class Rows:
    """Some rows of a global batch.

    Attributes:
        total: rows of the global batch, B.
        held: which of them, ascending.
    """

    total: int
    held: tuple[int, ...]


def held_rows(batch_size: int, length: int, mesh: Mesh) -> Rows | None:
    """Returns the rows of [B, T] batches that this process's devices hold; None: all of them.

    Args:
        batch_size, length: B and T.
        mesh: the mesh; where it has other axes, several processes may hold the same rows.
    """
    if jax.process_count() == 1:
        return None
    shape = (batch_size, length)
    places = batch_sharding(mesh).addressable_devices_indices_map(shape).values()
    held = {row for place in places for row in range(*place[0].indices(batch_size))}
    return Rows(batch_size, tuple(sorted(held)))


def global_batch(batch: Mapping[str, Any], mesh: Mesh, rows: Rows | None = None) -> dict[str, Any]:
    """Returns global arrays [B, ...] sharded by rows.

    Args:
        batch: arrays of the global batch, or of the rows of it that this process holds; an entry
            may be a batch of its own, of another number of rows.
        mesh: the mesh.
        rows: which rows those are; None: all.
    """
    sharding = batch_sharding(mesh)

    def place(array: np.ndarray) -> jax.Array:
        if rows is None:
            return jax.make_array_from_callback(array.shape, sharding, lambda at: array[at])
        shape = (rows.total, *array.shape[1:])

        def piece(at: tuple[slice, ...]) -> np.ndarray:
            first, end, _ = at[0].indices(rows.total)
            start = rows.held.index(first)
            return array[(slice(start, start + end - first), *at[1:])]

        return jax.make_array_from_callback(shape, sharding, piece)

    def nested(inner: Mapping[str, Any]) -> dict[str, Any]:
        if rows is None:
            return global_batch(inner, mesh)
        # Every process holds as large a share of one batch as of the other.
        here, length = next(iter(inner.values())).shape[:2]
        return global_batch(
            inner, mesh, held_rows(here * rows.total // len(rows.held), length, mesh)
        )

    return {
        name: nested(value) if isinstance(value, Mapping) else place(value)
        for name, value in batch.items()
    }


def on_all(arrays: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Returns the arrays whole on every device; each process gives the same ones."""
    place = replicated(mesh)
    return {
        name: jax.make_array_from_callback(array.shape, place, lambda at, array=array: array[at])
        for name, array in arrays.items()
    }
