"""What a mesh cannot do for a model, by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from jax.sharding import Mesh

from jaxtune.core.tree import Tree, flatten
from jaxtune.parallel.rules import LARGE, RULES, SPARE, elements_a_device, parts, stored_spec

# Mesh axes that split parameters, and the dimension that each is there for.
OWN = {"fsdp": "embed", "tensor": "mlp", "expert": "expert"}
STORED = tuple(OWN)
UNUSED = {
    "fsdp": "it splits no parameter by its rule: its devices hold what `data` would",
    "tensor": "it splits no parameter by its rule: its devices compute the same",
    "expert": "no parameter has experts that it splits: it is as `fsdp`",
}


@dataclasses.dataclass(frozen=True)
class Finding:
    """A rule that a mesh does not let a parameter follow.

    Attributes:
        parameter: its path; "" where the finding is about every parameter.
        logical_axis: the dimension that the rule is about.
        mesh_axis: what does not split it.
        why: a sentence without its full stop.
        bytes_per_device: of the parameter, as it lies now, all layers.
    """

    parameter: str
    logical_axis: str
    mesh_axis: str
    why: str
    bytes_per_device: int

    def line(self) -> str:
        """Returns the finding as text."""
        name = f"{self.parameter}: " if self.parameter else ""
        size = f" ({self.bytes_per_device / 2**20:,.1f} MiB a device)" if self.parameter else ""
        return f"mesh.{self.mesh_axis}: {name}{self.why}{size}"


def findings(axes: Tree, shapes: Tree, mesh: Mesh) -> list[Finding]:
    """Returns where rules could not be followed: what is split otherwise, or left whole if large.

    Args:
        axes: tree of logical axis tuples.
        shapes: tree of the same paths, arrays or ShapeDtypeStructs; holes are passed over.
        mesh: the mesh.
    """
    leaves = {path: leaf for path, leaf in flatten(shapes).items() if leaf is not None}
    names = flatten(axes)
    split = {path: split_of(names[path], leaf.shape, mesh) for path, leaf in leaves.items()}
    found = []
    for axis in (axis for axis in STORED if mesh.shape[axis] > 1):
        if not any(followed(names[path], split[path], axis) for path in leaves):
            found.append(Finding("", OWN[axis], axis, UNUSED[axis], 0))
        for path, leaf in leaves.items():
            found += _of_parameter(path, leaf, names[path], split[path], axis, mesh)
    return found


def split_of(axes: Sequence[str | None], shape: Sequence[int], mesh: Mesh) -> list[tuple[str, ...]]:
    """Returns the mesh axes of each dimension of a parameter."""
    entries = stored_spec(axes, shape, mesh)
    return [(e,) if isinstance(e, str) else tuple(e or ()) for e in entries]


def followed(axes: Sequence[str | None], split: Sequence[tuple[str, ...]], axis: str) -> bool:
    """Tells whether a mesh axis splits a dimension whose rule is what the axis is for."""
    return any(
        axis in taken and axis in rule_of(name) and (axis != "expert" or name == "expert")
        for name, taken in zip(axes, split, strict=True)
    )


def rule_of(name: str | None) -> tuple[str, ...]:
    """Returns the mesh axes of a logical axis' rule."""
    target = None if name is None else RULES[name]
    return (target,) if isinstance(target, str) else target or ()


def _of_parameter(
    path: str,
    leaf: Any,
    axes: Sequence[str | None],
    split: Sequence[tuple[str, ...]],
    axis: str,
    mesh: Mesh,
) -> list[Finding]:
    """Returns the finding of a parameter and a mesh axis, or nothing."""
    ruled = [i for i, name in enumerate(axes) if axis in rule_of(name)]
    spare = [i for i, name in enumerate(axes) if axis in SPARE.get(name, ())]
    taken = next((i for i, names in enumerate(split) if axis in names), None)
    if not (ruled or spare) or taken == (ruled or spare)[0] or (taken is not None and not ruled):
        return []
    place, left = (ruled or spare)[0], elements_a_device(axes, leaf.shape, split, mesh)
    if taken is None and left < LARGE:
        return []
    layers = leaf.shape[axes.index("layers")] if "layers" in axes else 1
    rule = rule_of(axes[place])
    wanted = parts(rule[: rule.index(axis) + 1], mesh) if ruled else mesh.shape[axis]
    result = "it is whole there" if taken is None else f"{axes[taken]} is split instead"
    why = f"{axes[place]} of {leaf.shape[place]:,} is no multiple of {wanted}; {result}"
    return [Finding(path, axes[place], axis, why, left * layers * leaf.dtype.itemsize)]
