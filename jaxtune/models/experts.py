"""Routed feed-forward layers: every token is computed by the experts that its router chooses."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AbstractMesh, PartitionSpec

from jaxtune.core.quantize import dense, is_quantized
from jaxtune.core.tree import flatten, map_paths
from jaxtune.models.config import Experts, ModelConfig
from jaxtune.models.expert_parallel import (
    Names,
    Piece,
    Spread,
    Weights,
    own_experts,
    total,
    varying,
)
from jaxtune.models.layers import gated_activation, kernel_param
from jaxtune.models.routing import Routing, product_with, route
from jaxtune.models.sorted_rows import sorted_rows, unsorted_rows
from jaxtune.parallel.rules import spec, stored_spec
from jaxtune.peft.method import Method, param

# Logical axes of each weight, and of the a and b of a product that is added to it.
WIDE = {
    "kernel": ("expert", "embed", "mlp"),
    "bias": ("expert", "mlp"),
    "a": ("expert", "embed", None),
    "b": ("expert", None, "mlp"),
}
AXES: dict[str, dict[str, tuple[str | None, ...]]] = {
    "router": {
        "kernel": ("embed", None),
        "bias": (None,),
        "a": ("embed", None),
        "b": (None, None),
    },
    "gate_proj": WIDE,
    "up_proj": WIDE,
    "down_proj": {
        "kernel": ("expert", "mlp", "embed"),
        "bias": ("expert", "embed"),
        "a": ("expert", "mlp", None),
        "b": ("expert", None, "embed"),
    },
}
PATHS = {n: f"blocks/mlp/{n if n == 'router' else f'experts/{n}'}" for n in AXES}
# How things lie on one device.
ALONE = Spread()
# Name of what the backward pass does not compute again.
KEPT = "kept of the experts"


class ExpertMlp(nnx.Module):
    """Gated experts without a capacity: no token is dropped, by matrix products over ragged groups.

    Tokens are sorted by expert, so that each expert multiplies one contiguous group
    (Gale et al. 2022, arXiv:2211.15841, "MegaBlocks").
    """

    def __init__(self, config: ModelConfig, method: Method, rngs: nnx.Rngs, residual_std: float):
        c, count = config, config.experts.count

        def weight(name, shape, std, bias):
            kernel = std * jax.random.normal(rngs.params(), shape, jnp.float32)
            kind = "none" if name == "router" else c.quantize
            leaves = {"kernel": kernel_param(kernel, AXES[name]["kernel"], kind)}
            if bias:
                zeros = jnp.zeros((*shape[:-2], shape[-1]), jnp.float32)
                leaves["bias"] = param(zeros, *AXES[name]["bias"])
            added = method.routed(PATHS[name], shape, AXES[name]["kernel"], rngs)
            if added is not None:
                leaves[method.name] = added
            return nnx.Dict(leaves)

        std, bias = c.initializer_range, c.experts.bias
        wide, narrow = (c.hidden_size, c.intermediate_size), (c.intermediate_size, c.hidden_size)
        self.router = weight("router", (c.hidden_size, count), std, c.experts.router_bias)
        self.experts = nnx.Dict(
            gate_proj=weight("gate_proj", (count, *wide), std, bias),
            up_proj=weight("up_proj", (count, *wide), std, bias),
            down_proj=weight("down_proj", (count, *narrow), residual_std, bias),
        )
        self.spec, self.activation, self.method = c.experts, c.activation, method

    def __call__(self, x: jax.Array) -> tuple[jax.Array, Routing]:
        """x [B, T, D] → ([B, T, D], where each token was sent).

        Each device sorts and computes its own rows. Left to XLA's partitioner, every device would
        do so for all rows of the batch.
        """
        nodes = {"router": self.router, **self.experts}
        leaves = {name: with_method(self.method, values(node)) for name, node in nodes.items()}
        mesh, run = jax.sharding.get_abstract_mesh(), functools.partial(mixture, self.spec)
        if mesh.empty or mesh.size == 1:
            return recomputed(functools.partial(run, self.activation))(x, leaves)
        counts = coarsest(leaves)
        spread = spread_of(x.shape, [counts[axis] for axis in WIDE["kernel"]], mesh)
        places = map_paths(lambda path, _: PartitionSpec(*map(spread.of, axes_of(path))), leaves)
        rows = PartitionSpec(spread.rows or None, spread.tokens or None)
        part = PartitionSpec(*rows, spread.summed("embed") or None)
        local = recomputed(functools.partial(run, self.activation, spread=spread))
        out = (part, Routing(rows, rows, rows))
        return jax.shard_map(local, mesh=mesh, in_specs=(part, places), out_specs=out)(x, leaves)


def spread_of(shape: Sequence[int], kernel: Sequence[int], mesh: AbstractMesh) -> Spread:
    """Returns how states [B, T, D] and up_proj's kernel [E, D, F] lie on a mesh."""
    batch = spec(("batch", "tokens"), shape[:2], mesh)
    axes = (*stored_spec(WIDE["kernel"], kernel, mesh), *batch)
    return Spread(*((e,) if isinstance(e, str) else tuple(e or ()) for e in axes))


def values(node: nnx.Dict) -> dict[str, Any]:
    """Returns the arrays of a node, as nested dicts."""
    return {k: values(v) if isinstance(v, nnx.Dict) else v[...] for k, v in node.items()}


def with_method(method: Method, leaves: dict[str, Any]) -> dict[str, Any]:
    """Returns a node's leaves with the method's a and b beside them, b times its scale."""
    if method.name not in leaves:
        return leaves
    leaves = dict(leaves)
    added = leaves.pop(method.name)
    return leaves | {"a": added["a"], "b": added["b"] * added.get("scale", method.scale)}


def axes_of(path: str) -> tuple[str | None, ...]:
    """Returns the logical axes of a leaf: a quantised kernel's are the kernel's."""
    name, key = path.split("/")[:2]
    return AXES[name][key]


def coarsest(leaves: dict[str, Any]) -> dict[str | None, int]:
    """Returns the smallest length of each logical axis: where there are blocks, their number.

    What divides it divides every leaf, so that all are cut at the same places.
    """
    found: dict[str | None, int] = {}
    for path, leaf in flatten(leaves).items():
        for axis, length in zip(axes_of(path), leaf.shape, strict=True):
            found[axis] = min(length, found.get(axis, length))
    return found


def recomputed(function: Callable) -> Callable:
    """Returns `function`, which keeps only what is named KEPT for the backward pass.

    The weights that it gathers and casts are not: kept, they would be the experts of all layers,
    whole, on every device.
    """
    policy = jax.checkpoint_policies.save_only_these_names(KEPT)
    return jax.checkpoint(function, policy=policy, prevent_cse=False)


def mixture(
    experts: Experts,
    activation: str,
    x: jax.Array,
    leaves: Weights,
    spread: Spread = ALONE,
) -> tuple[jax.Array, Routing]:
    """Returns (Σ_k weight_k · expert_k(x) [B, T, D], where each token was sent).

    Args:
        experts: how tokens are sent.
        activation: of the gates.
        x: [B, T, D]; under `shard_map`, a device's part of all sizes here.
        leaves: "router": {"kernel": [D, E], "bias": [E]}, and "gate_proj", "up_proj", "down_proj":
            {"kernel": [E, in, out], or the leaves of a quantised one, "bias": [E, out]}; beside
            a kernel, "a" [..., in, r] and "b" [..., r, out] of what a method adds to it.
        spread: mesh axes that split them.
    """
    here = {
        name: {key: placed(leaf, AXES[name][key], spread, x.dtype) for key, leaf in n.items()}
        for name, n in leaves.items()
    }
    router = here.pop("router")
    routing = route(experts, x, router, spread.summed("embed"))
    weighted = of_own_experts if spread.expert else of_all_experts
    return weighted(activation, x, here, routing, spread), routing


def placed(
    leaf: Any, axes: Sequence[str | None], spread: Spread, dtype: jax.typing.DTypeLike
) -> jax.Array:
    """Returns a device's part of a weight in the products, gathered along the axes of the rows.

    A quantised one travels in its codes.
    """
    own = tuple(name for axis in axes for name in spread.of(axis) or ())

    def moved(part: jax.Array) -> jax.Array:
        if spread.expert and "expert" in axes:
            part = varying(part, own, spread.work)
        for dimension, axis in enumerate(axes):
            names = spread.gathered(axis) if axis in ("embed", "mlp") else ()
            if names:
                part = jax.lax.all_gather(part, names, axis=dimension, tiled=True)
        return part

    if is_quantized(leaf):
        return dense(jax.tree.map(moved, leaf), dtype)
    return moved(leaf.astype(dtype))


def feed_forward(
    activation: str,
    leaves: Weights,
    h: jax.Array,
    owner: jax.Array,
    product: Callable[[jax.Array, dict[str, jax.Array]], jax.Array],
    summed: Names,
) -> jax.Array:
    """Returns the experts' outputs [m, D], without down_proj's bias, of rows sorted by expert.

    Args:
        activation: of the gates.
        leaves: the experts' weights.
        h: [m, D].
        owner: int32 [m], the expert of each row.
        product: (rows, leaves of a projection) → each row times its expert's kernel.
        summed: mesh axes that split D.
    """

    def project(name: str) -> jax.Array:
        y, bias = total(product(h, leaves[name]), summed), leaves[name].get("bias")
        return y if bias is None else y + bias[owner]

    inner = gated_activation(activation, project("gate_proj"), project("up_proj"))
    return product(inner, leaves["down_proj"])


def of_all_experts(
    activation: str, x: jax.Array, leaves: Weights, routing: Routing, spread: Spread
) -> jax.Array:
    """Returns the weighted outputs where each device has a part of every expert."""
    expert = routing.chosen.reshape(-1)  # of each (token, choice)
    order = checkpoint_name(jnp.argsort(expert), KEPT)
    place = checkpoint_name(jnp.argsort(order), KEPT)
    sizes = jnp.bincount(expert, length=leaves["up_proj"]["kernel"].shape[0])

    def ragged(h: jax.Array, kernel: jax.Array) -> jax.Array:
        return jax.lax.ragged_dot(h, kernel, sizes)

    def product(h: jax.Array, node: dict[str, jax.Array]) -> jax.Array:
        return checkpoint_name(product_with(ragged, h, node), KEPT)

    h = sorted_rows(x.reshape(-1, x.shape[-1]), order, place)
    h = feed_forward(activation, leaves, h, expert[order], product, spread.summed("embed"))
    given = unsorted_rows(h, order, place).reshape(*routing.chosen.shape, -1)
    weights = routing.weights.astype(x.dtype)
    y = total(jnp.einsum("...k,...kd->...d", weights, given), spread.summed("mlp"))
    bias = leaves["down_proj"].get("bias")
    if bias is not None:
        y = y + jnp.einsum("...k,...kd->...d", weights, bias[routing.chosen])
    return y


def of_own_experts(
    activation: str, x: jax.Array, leaves: Weights, routing: Routing, spread: Spread
) -> jax.Array:
    """Returns the weighted outputs where each device has some experts; see `expert_parallel`."""
    own, (axis,) = spread.work, spread.expert
    summed, halves = spread.summed("embed"), spread.summed("mlp")
    gathers = axis in spread.rows

    def whole(value: jax.Array) -> jax.Array:
        return jax.lax.all_gather(value, axis, axis=0, tiled=True) if gathers else value

    def compute(leaves: Weights, h: jax.Array, piece: Piece) -> jax.Array:
        def ragged(h: jax.Array, kernel: jax.Array) -> jax.Array:
            y = jax.lax.ragged_dot(h, kernel, piece.sizes)
            return jnp.where(piece.real[:, None], y, 0)

        product = functools.partial(product_with, ragged)
        y = feed_forward(activation, leaves, h, piece.owner, product, summed)
        bias = leaves["down_proj"].get("bias")
        if bias is None:
            return y
        once = jax.lax.axis_index(halves) == 0 if halves else True
        return y + jnp.where(once, bias, 0)[piece.owner]

    tokens = whole(varying(x, (*spread.batch, *summed), own))
    gates = whole(varying(routing.weights.astype(x.dtype), spread.batch, own))
    chosen = whole(varying(routing.chosen, spread.batch, own))
    count = leaves["up_proj"]["kernel"].shape[0]
    share = routing.chosen.size if gathers else -(-chosen.size // jax.lax.axis_size(axis))
    y = own_experts(
        compute,
        tokens.reshape(-1, x.shape[-1]),
        gates.reshape(-1, gates.shape[-1]),
        chosen.reshape(-1, gates.shape[-1]),
        leaves,
        jax.lax.axis_index(axis) * count,
        share,
        own,
    )
    y = y.reshape(tokens.shape).astype(x.dtype)
    if gathers:
        y = jax.lax.psum_scatter(y, axis, scatter_dimension=0, tiled=True)
    else:
        y = total(y, (axis,))
    return total(y, halves)
