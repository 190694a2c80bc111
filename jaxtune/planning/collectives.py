"""The collectives of a compiled program: how often each runs, how much it moves, and of what."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable

from jaxtune.planning.hlo import Instruction, Module, bytes_of, called_by, shapes_of

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
_MESH_AXIS = re.compile(r"'([^']+)'=(\d+)")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of a program, as one device sees it.

    Attributes:
        kind: one of `KINDS`.
        shapes: (dtype, dimensions) of each array: of what comes out, or for a reduce-scatter of
            what goes in; the whole, not a device's share.
        bytes: of these arrays.
        group: devices that take part together.
        runs: how often it runs in a step.
        op_name: JAX's name of the operation that it is for.
        parameters: names of the parameters that it moves, empty for computed values.
        place: the computation that it stands in.
    """

    kind: str
    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    bytes: int
    group: int
    runs: int
    op_name: str
    parameters: tuple[str, ...]
    place: str

    @property
    def link_bytes(self) -> float:
        """Bytes that a device sends in one run, by ring algorithms (Thakur et al. 2005)."""
        share = (self.group - 1) / self.group if self.group else 1.0
        factor = {"all-reduce": 2 * share, "collective-permute": 1.0}.get(self.kind, share)
        return factor * self.bytes


def collectives(module: Module) -> list[Collective]:
    """Returns the collectives of a program.

    Those among a single device move nothing and are left out. TPU programs spread one collective
    over several fusions, which begin it, compute beside it and end it; they share its channel, and
    it is counted once.
    """
    found, seen = [], set()
    fused = {
        called
        for body in module.computations.values()
        for i in body.values()
        if i.opcode == "fusion"
        for called in called_by(i)
    }
    for name, body in module.computations.items():
        for i in body.values():
            kind = i.opcode.removesuffix("-start")
            if kind not in KINDS or not module.executions[name]:
                continue
            channel = i.attribute("channel_id")
            if name in fused and channel is not None:
                if (kind, channel) in seen:
                    continue
                seen.add((kind, channel))
            if group_size(i.rest) != 1:
                found.append(_collective(module, name, i, kind))
    return found


def summary(found: Iterable[Collective]) -> dict[str, dict[str, int]]:
    """Returns {kind: {"count", "bytes"}} of a step, each run counted."""
    table: dict[str, dict[str, int]] = {}
    for c in found:
        row = table.setdefault(c.kind, {"count": 0, "bytes": 0})
        row["count"] += c.runs
        row["bytes"] += c.runs * c.bytes
    return dict(sorted(table.items()))


def _collective(module: Module, computation: str, i: Instruction, kind: str) -> Collective:
    shapes = shapes_of(i.type)
    if kind == "reduce-scatter":
        body = module.computations[computation]
        shapes = tuple(s for o in i.operands for s in shapes_of(body[o].type))
    elif i.opcode.endswith("-start"):
        shapes = _result_of_start(kind, i, shapes)
    parameters: set[str] = set()
    for operand in i.operands:
        parameters |= module.origins(computation, operand)
    return Collective(
        kind,
        shapes,
        bytes_of(shapes),
        group_size(i.rest),
        module.executions[computation],
        i.op_name,
        tuple(sorted(parameters)),
        computation,
    )


def _result_of_start(kind: str, i: Instruction, shapes: tuple) -> tuple:
    """An asynchronous start gives (operands, results, context); an all-reduce only results."""
    if kind == "all-reduce":
        return shapes
    count = len(i.operands)
    return shapes[count : 2 * count]


def group_size(attributes: str) -> int:
    """Returns how many devices take part in a collective together; 0 if the text does not say.

    >>> group_size("replica_groups={{0,1,2},{3,4,5}}"), group_size("replica_groups=[2,8]<=[16]")
    (3, 8)
    >>> group_size("replica_groups=mesh['axis_0'=16,'axis_1'=2] {'axis_0'}, dimensions={0}")
    16
    """
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", attributes)
    if listed:
        return len(listed[1].split(","))
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]<=", attributes)
    if iota:
        return int(iota[2])
    mesh = re.search(r"replica_groups=(?:@?\w+|mesh\[([^\]]*)\])\s*\{([^}]*)\}", attributes)
    if mesh and mesh[1]:
        sizes = dict(_MESH_AXIS.findall(mesh[1]))
        axes = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", mesh[2])
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    return 0


Dims = tuple[int, ...]


def largest(found: Iterable[Collective]) -> Collective | None:
    """Returns the collective that moves the most bytes at once."""
    return max(found, key=lambda c: c.bytes, default=None)


def gradient_collectives(found: Iterable[Collective], shapes: Iterable[Dims]) -> list[Collective]:
    """Returns the sums over devices of computed values that have the shape of a given weight.

    For frozen weights there should be none. A sum is an all-reduce or a reduce-scatter, or the
    steps of a reduce-scatter that XLA wove into a product ("windowed", a loop of permutes). An
    all-reduce that puts the shards of a parameter together is no sum of gradients.

    Args:
        found: of `hlo.collectives`.
        shapes: of the weights; stacked ones without their layers, whole or as a device has them.
    """
    wanted = {squeezed(dims) for dims in shapes if math.prod(dims) > max(dims, default=0)}
    return [c for c in found if sums(c) and any(squeezed(dims) in wanted for _, dims in c.shapes)]


def sums(c: Collective) -> bool:
    """Tells whether a collective adds up what devices computed."""
    if c.parameters:
        return False
    woven = c.kind == "collective-permute" and "windowed" in c.place and "_rs" in c.place
    return woven or c.kind in ("all-reduce", "reduce-scatter")


def squeezed(dims: Dims) -> Dims:
    """Returns the dimensions without ones, sorted: layouts and stacks differ in their order.

    >>> squeezed((1, 4096, 256))
    (256, 4096)
    """
    return tuple(sorted(n for n in dims if n != 1))
