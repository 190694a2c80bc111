"""Where a program runs, and where its cache lies: on the mesh that holds the parameters."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

import jax
from jax.sharding import NamedSharding

from jaxtune.core.tree import Tree
from jaxtune.models.cache import Cache
from jaxtune.parallel.rules import constrain


@contextlib.contextmanager
def mesh_of(params: Tree) -> Iterator[None]:
    """Sets the mesh that the parameters are spread over, if they are, so that layouts are pinned.

    Numbers do not depend on it; without it, XLA would choose how to spread activations.
    """
    sharding = getattr(jax.tree.leaves(params)[0], "sharding", None)
    if not isinstance(sharding, NamedSharding):
        yield
        return
    with jax.set_mesh(sharding.mesh):
        yield


def spread_cache(cache: Cache) -> Cache:
    """Returns the cache laid out on the mesh that is set, if any.

    Rows go to the mesh's batch axes and heads to `tensor`; too few heads, and the width of each
    goes there, so that no device holds the cache of all.
    """
    kv = ("layers", "batch", "kv_heads", None, "head")
    return dataclasses.replace(
        cache,
        keys=constrain(cache.keys, *kv),
        values=constrain(cache.values, *kv),
        segment_ids=constrain(cache.segment_ids, "batch", None),
        positions=constrain(cache.positions, "batch", None),
    )
