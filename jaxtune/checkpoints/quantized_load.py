"""Quantising while loading: a layer at a time, on the devices that hold its part."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from jaxtune.core.quantize import ABSMAX, CODES, quantize
from jaxtune.core.tree import Tree, flatten, unflatten

Read = Callable[[tuple[slice, ...]], np.ndarray]


def quantized_param(
    layer_of: Callable[[int], Read],
    shape: Sequence[int],
    kind: str,
    leaves: Mapping[str, jax.ShapeDtypeStruct],
    places: Mapping[str, Sharding],
) -> dict[str, jax.Array]:
    """Returns {"codes", "absmax"} of a stacked kernel [L, ..., in, out].

    Beside the result there is never more than one layer in full size.

    Args:
        layer_of: a layer's number → the callback of `jax.make_array_from_callback` that reads its
            kernel [..., in, out], float32.
        shape: of the stacked kernel.
        kind: "int8" or "nf4".
        leaves, places: shapes and shardings of the result.
    """
    whole = layer_sharding(places[CODES])

    def empty() -> dict[str, jax.Array]:
        return {name: jnp.zeros(leaf.shape, leaf.dtype) for name, leaf in leaves.items()}

    result = jax.jit(empty, out_shardings=dict(places))()
    put = _put(kind, tuple(sorted(places.items())))
    for number in range(shape[0]):
        kernel = jax.make_array_from_callback(tuple(shape[1:]), whole, layer_of(number))
        # One at a time: what was read is freed before the next is.
        result = jax.block_until_ready(put(result, kernel, number))
    return result


def layer_sharding(place: Sharding) -> Sharding:
    """Returns where one layer of a stack lies."""
    if not isinstance(place, NamedSharding):
        return place
    return NamedSharding(place.mesh, PartitionSpec(*place.spec[1:]))


@functools.cache
def _put(kind: str, places: tuple[tuple[str, Sharding], ...]) -> Callable:
    def put(result: dict[str, jax.Array], kernel: jax.Array, number: Any) -> dict[str, jax.Array]:
        fresh = quantize(kernel, kind)
        return {name: stack.at[number].set(fresh[name]) for name, stack in result.items()}

    return jax.jit(put, donate_argnums=0, out_shardings=dict(places))


def quantized_tree(
    params: Tree, kind: str, leaves: Mapping[str, Any], places: Mapping[str, Sharding]
) -> Tree:
    """Returns `params` with the kernels quantised that are so in `leaves`, one after the other.

    Args:
        params: nested dict with whole kernels.
        kind: "int8" or "nf4".
        leaves, places: {path: shape}, {path: sharding} of the result.
    """
    flat = flatten(params)
    del params
    result = {}
    for path in [path for path in flat if path not in leaves]:
        where = {name: places[f"{path}/{name}"] for name in (CODES, ABSMAX)}
        made = jax.jit(functools.partial(quantize, kind=kind), out_shardings=where)(flat.pop(path))
        result |= {f"{path}/{name}": leaf for name, leaf in made.items()}
    return unflatten({path: (result | flat)[path] for path in leaves})
