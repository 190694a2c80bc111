"""The seam between NNX modules and nested dicts: the only file that splits and merges modules.

Inside, a model is an `nnx.Module`; outside, parameters are nested dicts of arrays.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from jaxtune.core.tree import Tree, flatten, unflatten


def split(module: nnx.Module) -> tuple[Any, Tree]:
    """Returns (structure, params): what `merge` needs, and the nested dict of arrays."""
    graphdef, state = nnx.split(module)
    return graphdef, nnx.to_pure_dict(state)


def merge(graphdef: Any, params: Tree) -> nnx.Module:
    """Returns the module with these parameters; the inverse of `split`."""
    return nnx.merge(graphdef, nnx.State(params))


def logical_axes(module: nnx.Module, stacked: tuple[str, ...] = ("blocks",)) -> Tree:
    """Returns the logical axis names of each parameter; stacked layers get a leading "layers"."""
    _, state = nnx.split(module)
    flat = {}
    for path, variable in flatten(_variables(state)).items():
        axes = tuple(variable.get_metadata()["logical_axes"])
        flat[path] = ("layers", *axes) if path.split("/")[0] in stacked else axes
    return unflatten(flat)


def _variables(state: Any) -> Any:
    if isinstance(state, nnx.Variable):
        return state
    return {key: _variables(child) for key, child in state.items()}


def stack(make: Callable[[jax.Array], nnx.Module], keys: jax.Array) -> nnx.Module:
    """Returns one module whose parameters are those of `make(key)`, stacked on axis 0."""
    return jax.vmap(make)(keys)


def scan_layers(
    stacked: nnx.Module,
    body: Callable[[nnx.Module, Any, Any], Any],
    carry: Any,
    xs: Any,
    wrap: Callable[[Callable], Callable],
) -> Any:
    """Runs `carry = body(layer, carry, x)` over the stacked layers by `lax.scan`.

    Args:
        stacked: the module from `stack`, L layers.
        body: one layer.
        carry: what goes from layer to layer.
        xs: a tree of arrays [L, ...], a slice for each layer.
        wrap: a transformation of the scan's body, such as `jax.checkpoint`.
    """
    graphdef, params = split(stacked)

    # The slices of the scan's own inputs are not copied for the backward pass; anything made of
    # them is: a reshape here would hold the frozen weights a second time.
    def layer(carry, slices):
        return body(merge(graphdef, slices[0]), carry, slices[1]), None

    return jax.lax.scan(wrap(layer), carry, (params, xs))[0]
