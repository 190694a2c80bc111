"""Attention's own layout: rows and heads over the mesh, each device alone with its share."""

from __future__ import annotations

import dataclasses
import math

import jax
from jax.sharding import PartitionSpec

from jaxtune.parallel.mesh import BATCH_AXES, HEAD_AXIS, SEQUENCE_AXIS


@dataclasses.dataclass(frozen=True)
class Share:
    """How the arrays of one attention are spread.

    Attributes:
        rows, tokens, heads: mesh axes of B, T and the heads; None where they stay whole.
        repeat: how often each key head is repeated so that its queries lie beside it.
    """

    rows: tuple[str, ...] | None
    tokens: str | None
    heads: str | None
    repeat: int

    @property
    def states(self) -> PartitionSpec:
        """Of queries, keys and values [B, T, N, H]."""
        return PartitionSpec(self.rows, self.tokens, self.heads, None)

    @property
    def span(self) -> PartitionSpec:
        """Of segment ids and positions [B, T]."""
        return PartitionSpec(self.rows, self.tokens)

    @property
    def axes(self) -> tuple[str, ...]:
        """Over which rows and tokens are spread."""
        return (*(self.rows or ()), *(() if self.tokens is None else (self.tokens,)))


def share(batch: int, tokens: int, heads: int, groups: int) -> Share | None:
    """Returns the Share on the mesh that is set, or None where there is one device only.

    What an axis does not divide stays whole on it. Fewer key heads than devices are repeated if
    that makes both numbers of heads multiples of the axis.

    Args:
        batch, tokens: B and T.
        heads, groups: N query heads and K key heads.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return None
    shards = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    along, across = mesh.shape[SEQUENCE_AXIS], mesh.shape[HEAD_AXIS]
    repeat = across // math.gcd(across, groups)
    split = across > 1 and heads % (groups * repeat) == 0
    return Share(
        BATCH_AXES if shards > 1 and batch % shards == 0 else None,
        SEQUENCE_AXIS if along > 1 and tokens % along == 0 else None,
        HEAD_AXIS if split else None,
        repeat if split else 1,
    )
