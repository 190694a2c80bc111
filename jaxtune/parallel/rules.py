"""Logical axis names to mesh axes, in one place."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxtune.core.tree import Tree, map_paths
from jaxtune.parallel.mesh import BATCH_AXES, SEQUENCE_AXIS

# Which mesh axes split a dimension. Parameters are spread over `fsdp` along the embedding and over
# `tensor` along the inner width (Megatron's column and row layout), experts over `expert`; what is
# no expert's is spread over `expert` too, along the embedding. Tokens of a row go over `sequence`,
# whose devices share the parameters as those of `fsdp` do.
RULES: dict[str, str | tuple[str, ...] | None] = {
    "batch": BATCH_AXES,
    "tokens": SEQUENCE_AXIS,
    "embed": (SEQUENCE_AXIS, "expert", "fsdp"),
    "vocab": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head": "tensor",  # of a cache whose heads are too few
    "mlp": "tensor",
    "layers": None,
    "expert": "expert",
}
# Which mesh axes split the dimension of a stored parameter that is large and that they would leave
# whole: GPT-2's 50,257 rows are odd, so `tensor` splits their columns instead; LoRA's B has no
# embedding that `fsdp` could split. `layers` has none: a scan over split layers gathers them all.
SPARE: dict[str, tuple[str, ...]] = {
    "embed": ("tensor", "expert", "fsdp"),
    "vocab": ("expert", "fsdp"),
    "heads": ("expert", "fsdp"),
    "kv_heads": ("expert", "fsdp"),
    "mlp": ("expert", "fsdp"),
}
# Elements of one layer's array on one device from which on it is large: 1 MiB in float32. What is
# smaller costs more to gather than to hold.
LARGE = 2**18
# The order in which spare axes are tried. A spare axis lies inside those of the rule, so that XLA
# gathers along both at once; outside, `tensor` would split hidden states too, and they would be
# gathered before every product. Not so in experts, which place their own: of the axes over which
# rows are spread, the last in this order, a part may be gathered, and what is left is contiguous.
OUTER_FIRST = ("data", "sequence", "tensor", "expert", "fsdp")

Names = tuple[str, ...]  # the mesh axes of one dimension


def spec(axes: Sequence[str | None], shape: Sequence[int], mesh: Mesh) -> PartitionSpec:
    """Returns the PartitionSpec of an activation with these logical axes.

    A dimension is split by the mesh axes of its rule, up to the first that does not divide it; no
    mesh axis splits two dimensions, the first takes it. A name without a rule is an error.
    """
    return PartitionSpec(*map(_entry, _by_rule(axes, shape, mesh)))


def stored_spec(axes: Sequence[str | None], shape: Sequence[int], mesh: Mesh) -> PartitionSpec:
    """Returns the PartitionSpec of a parameter: by its rules, and if large by the spare ones too.

    A dimension that its mesh axes do not divide stays whole, so that a vocabulary of odd size
    trains on every mesh; in a large parameter another dimension takes the axis (`SPARE`).
    """
    split = _by_rule(axes, shape, mesh)
    for axis in OUTER_FIRST:
        if mesh.shape[axis] == 1 or axis in (name for names in split for name in names):
            continue
        if elements_a_device(axes, shape, split, mesh) < LARGE:
            break
        for place, name in enumerate(axes):
            known = SPARE.get(name, ())
            if axis in known and shape[place] % (parts(split[place], mesh) * mesh.shape[axis]) == 0:
                split[place] = (*split[place], axis)
                if "expert" in axes:
                    split[place] = tuple(sorted(split[place], key=OUTER_FIRST.index))
                break
    return PartitionSpec(*map(_entry, split))


def _by_rule(axes: Sequence[str | None], shape: Sequence[int], mesh: Mesh) -> list[Names]:
    split: list[Names] = []
    for name, length in zip(axes, shape, strict=True):
        target = None if name is None else RULES[name]
        taken: Names = ()
        for axis in (target,) if isinstance(target, str) else target or ():
            if mesh.shape[axis] == 1 or any(axis in names for names in split):
                continue
            if length % (parts(taken, mesh) * mesh.shape[axis]):
                break
            taken = (*taken, axis)
        split.append(taken)
    return split


def _entry(names: Names) -> str | Names | None:
    """Returns the entry of a PartitionSpec."""
    return names if len(names) > 1 else names[0] if names else None


def parts(names: Names, mesh: Mesh) -> int:
    """Returns into how many parts these mesh axes split a dimension."""
    return math.prod(mesh.shape[axis] for axis in names)


def weight_shards(mesh: Mesh) -> int:
    """Returns over how many devices a weight that each of them computes with is spread."""
    return parts(RULES["embed"], mesh)


def elements_a_device(
    axes: Sequence[str | None], shape: Sequence[int], split: Sequence[Names], mesh: Mesh
) -> int:
    """Returns the elements of one layer's array on one device."""
    return math.prod(
        length // parts(names, mesh)
        for name, length, names in zip(axes, shape, split, strict=True)
        if name != "layers"
    )


def shardings(axes: Tree, shapes: Tree, mesh: Mesh) -> Tree:
    """Returns the NamedSharding of each parameter.

    Args:
        axes: tree of logical axis tuples.
        shapes: tree of the same paths, arrays or ShapeDtypeStructs; holes stay holes.
        mesh: the mesh.
    """

    def place(_: str, leaf: Any, names: Sequence[str | None]) -> NamedSharding:
        return NamedSharding(mesh, stored_spec(names, leaf.shape, mesh))

    return map_paths(place, shapes, axes)


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of a value that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of [B, T] arrays: by rows, and by tokens on a `sequence` axis."""
    tokens = (SEQUENCE_AXIS,) if mesh.shape[SEQUENCE_AXIS] > 1 else ()
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES, *tokens))


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Returns x pinned to the layout of its logical axes on the mesh that is set, if any."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, spec(axes, x.shape, mesh))


def state_shardings(state: Any, params: Tree, mesh: Mesh) -> Any:
    """Returns shardings of an optimizer state: moments as their parameter, the rest replicated.

    Args:
        state: the state's shapes; a moment's path in it ends with the path of its parameter.
        params: {path: (shape, NamedSharding)} of the parameters.
        mesh: the mesh.
    """
    whole = replicated(mesh)

    def find(path: tuple, leaf: Any) -> NamedSharding:
        keys = [str(k.key) for k in path if isinstance(k, jax.tree_util.DictKey)]
        for start in range(len(keys)):
            shape, sharding = params.get("/".join(keys[start:]), (None, None))
            if shape == leaf.shape:
                return sharding
        return whole

    return jax.tree_util.tree_map_with_path(find, state)
