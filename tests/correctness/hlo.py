"""Reads the collectives of a compiled program."""

from __future__ import annotations

import dataclasses
import re

import numpy as np

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "ragged-all-to-all",
)
CALL = re.compile(rf"= (\(.*?\)|\S+) ({'|'.join(KINDS)})(?:-start)?\((.*)")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective.

    Attributes:
        kind: such as "all-reduce".
        shapes: dimensions of each of its results.
        groups: the devices that speak with each other, as numbers in the order of the mesh.
        source: where it comes from, a path through the program.
    """

    kind: str
    shapes: tuple[tuple[int, ...], ...]
    groups: tuple[tuple[int, ...], ...]
    source: str

    @property
    def elements(self) -> int:
        """Elements of the largest result."""
        return max(int(np.prod(shape)) for shape in self.shapes)

    def crosses(self, per_slice: int) -> bool:
        """Whether devices of several runs of `per_slice` speak with each other."""
        return any(len({device // per_slice for device in group}) > 1 for group in self.groups)


def collectives(text: str, devices: int) -> list[Collective]:
    """The collectives of `compiled.as_text()`; a loop's body counts once."""
    found = []
    for line in text.splitlines():
        if match := CALL.search(line):
            result, kind, rest = match.groups()
            shapes = tuple(
                tuple(int(n) for n in dims.split(",") if n)
                for dims in re.findall(r"\w+\[([\d,]*)\]", result)
            )
            source = re.search(r'op_name="([^"]*)"', rest)
            groups = _groups(rest, devices)
            found.append(Collective(kind, shapes, groups, source[1] if source else ""))
    return found


def _groups(rest: str, devices: int) -> tuple[tuple[int, ...], ...]:
    """Lists, written out or as `[groups,size]<=[dims]T(order)`; none means all devices."""
    pairs = re.search(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{}]*\})\}", rest)
    if pairs:
        lists = re.findall(r"\{([\d,]+)\}", pairs[1])
        return tuple(tuple(int(n) for n in group.split(",")) for group in lists)
    named = re.search(r"replica_groups=mesh\[(.*?)\](?:, device_ids=\((.*?)\))? \{(.*?)\}", rest)
    if named:  # groups vary over some axes of a mesh
        axes = re.findall(r"'(\w+)'=(\d+)", named[1])
        chosen = [i for i, (name, _) in enumerate(axes) if f"'{name}'" in named[3]]
        assert re.fullmatch(r"('\w+'(, ?)?)+", named[3]), named[3]
        numbers = np.arange(devices) if named[2] is None else _iota(named[2].strip("[]"))
        numbers = numbers.reshape([int(size) for _, size in axes])
        numbers = np.moveaxis(numbers, chosen, range(-len(chosen), 0))
        size = int(np.prod([int(axes[i][1]) for i in chosen]))
        return tuple(tuple(group) for group in numbers.reshape(-1, size).tolist())
    lists = re.search(r"replica_groups=\[([\d,]+)\]<=\[(.*?)(?:, |$)", rest)
    if lists:
        numbers = _iota(lists[2].rstrip("]")).reshape([int(n) for n in lists[1].split(",")])
        return tuple(tuple(group) for group in numbers.tolist())
    assert "replica_groups={}" in rest or "replica_groups" not in rest, rest
    return (tuple(range(devices)),)


def _iota(text: str) -> np.ndarray:
    """`2,4]T(1,0)`: 0, 1, … of these dimensions, transposed."""
    dims, _, order = text.partition("]T(")
    numbers = [int(n) for n in dims.strip("[]").split(",")]
    found = np.arange(np.prod(numbers)).reshape(numbers)
    return found.transpose([int(n) for n in order.strip(")").split(",")]) if order else found
