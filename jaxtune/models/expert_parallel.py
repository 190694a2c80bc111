"""Experts spread over devices: each device computes its own experts, for the tokens of all.

Rows of a batch are spread over the mesh axis `expert` like over `data`. In a routed layer each of
its X devices gathers the t tokens of the others, computes what its E / X experts give for them,
and the sums go back to where the tokens came from (reduce-scatter). No token is dropped.

Cost a layer and device, D the width of a token and k its experts: X t D elements of gathered
tokens, as many float32 sums, and t k / PIECES computed rows at a time, however uneven the routing
is. Sent along `expert`: 2 (X - 1) t D elements forwards and 3 (X - 1) t D backwards, which gathers
the tokens again; weights never are. Sending each token to its k experts only takes
2 k (X - 1) / X · t D forwards, less where X > k; but an all-to-all of static shapes that drops
nothing must have room for every token at every device, which is this gather, and
`ragged_all_to_all` is a TPU's alone. Along `fsdp` a device gathers the E / X experts of one layer.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

Names = tuple[str, ...]
Weights = dict[str, dict[str, jax.Array]]
# Pieces of a device's even share of the work: it computes as many as it has rows for.
PIECES = 2


class Spread(NamedTuple):
    """Mesh axes that split each dimension of the experts' kernels, and rows [B] and tokens [T].

    An axis that splits the batch too is gathered along before a product; along another one, each
    device has a part of the sum.
    """

    expert: Names = ()
    embed: Names = ()
    mlp: Names = ()
    rows: Names = ()
    tokens: Names = ()

    @property
    def batch(self) -> Names:
        """All mesh axes that split a batch."""
        return (*self.rows, *self.tokens)

    def of(self, logical: str | None) -> Names | None:
        """Returns the mesh axes of a weight's dimension."""
        return (getattr(self, logical) or None) if logical else None

    def summed(self, logical: str) -> Names:
        """Returns the mesh axes along which a dimension stays split in a product."""
        return tuple(axis for axis in getattr(self, logical) if axis not in self.batch)

    def gathered(self, logical: str) -> Names:
        """Returns the mesh axes along which a dimension of a weight is gathered."""
        return tuple(axis for axis in getattr(self, logical) if axis in self.batch)

    @property
    def work(self) -> Names:
        """All mesh axes over which the work of the experts differs."""
        split = (self.batch, self.expert, self.summed("embed"), self.summed("mlp"))
        return tuple(dict.fromkeys(axis for axes in split for axis in axes))


def varying(x: jax.Array, present: Names, wanted: Names) -> jax.Array:
    """Returns x, which differs over the mesh axes `present`, as a value that does over `wanted`.

    The transpose sums over the axes between: at this place, and so outside of any loop.
    """
    missing = tuple(axis for axis in wanted if axis not in present)
    return jax.lax.pcast(x, missing, to="varying") if missing else x


def total(x: jax.Array, axes: Names) -> jax.Array:
    """Returns the sum over these mesh axes."""
    return jax.lax.psum(x, axes) if axes else x


class Sorted(NamedTuple):
    """A device's work in the order of its experts.

    Attributes:
        order: int32 [n k, padded], each (token, choice), those of own experts first.
        expert: int32 [n k], the own expert of each (token, choice); E / X for another device's.
        ends: int32 [E / X], where the rows of each expert end in `order`.
    """

    order: jax.Array
    expert: jax.Array
    ends: jax.Array


class Piece(NamedTuple):
    """Some rows of it: bool [c], which are real; int32 [c], their expert; int32 [E / X], sizes."""

    real: jax.Array
    owner: jax.Array
    sizes: jax.Array


# (weights, tokens [c, D], piece) → what their experts give [c, D].
Compute = Callable[[Weights, jax.Array, Piece], jax.Array]


def own_experts(
    compute: Compute,
    x: jax.Array,
    gates: jax.Array,
    chosen: jax.Array,
    weights: Weights,
    first: jax.Array,
    share: int,
    axes: Names,
) -> jax.Array:
    """Returns Σ gate · expert(x) over the chosen experts that this device has, float32 [n, D].

    Args:
        compute: what experts do with sorted rows.
        x: [n, D] tokens.
        gates: [n, k] factor of each chosen expert.
        chosen: int32 [n, k].
        weights: of the experts `first`, `first` + 1, ….
        first: int32 scalar.
        share: rows that a device computes when routing is even.
        axes: mesh axes over which x, gates and weights differ.
    """
    count = weights["down_proj"]["kernel"].shape[0]
    expert = chosen.reshape(-1) - first
    expert = jnp.where((expert >= 0) & (expert < count), expert, count)
    order = jnp.argsort(expert)
    width = min(-(-share // PIECES), order.size)
    ends = jnp.cumsum(jnp.bincount(expert, length=count))
    work = Sorted(jnp.pad(order, (0, -order.size % width)), expert, ends)
    return _weighted_sum((compute, width, axes), x, gates, weights, work)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _weighted_sum(static, x, gates, weights, work):
    """A loop over pieces that runs as often as there is work, which autodiff has no rule for."""
    compute, width, axes = static

    def add(number, y):
        rows, piece = _piece(work, width, number)
        token = rows // gates.shape[1]
        part = _part(compute, x[token], gates.reshape(-1)[rows], weights, piece)
        return y.at[token].add(part)

    y = varying(jnp.zeros(x.shape, jnp.float32), (), axes)
    return _for_all_pieces(work, width, add, y)


def _forward(static, x, gates, weights, work):
    return _weighted_sum(static, x, gates, weights, work), (x, gates, weights, work)


def _backward(static, kept, dy):
    """Computes each piece again, and its derivatives."""
    (compute, width, axes), (x, gates, weights, work) = static, kept

    def add(number, sums):
        dx, dgates, dweights = sums
        rows, piece = _piece(work, width, number)
        token = rows // gates.shape[1]
        run = functools.partial(_part, compute, piece=piece)
        _, pull = jax.vjp(run, x[token], gates.reshape(-1)[rows], weights)
        dh, dgate, more = pull(dy[token])
        dweights = jax.tree.map(lambda a, b: a + b.astype(jnp.float32), dweights, more)
        return dx.at[token].add(dh.astype(jnp.float32)), dgates.at[rows].add(dgate), dweights

    def zeros(shape, dtype=jnp.float32):
        return varying(jnp.zeros(shape, dtype), (), axes)

    begin = (
        zeros(x.shape),
        zeros(gates.size, gates.dtype),
        jax.tree.map(lambda w: zeros(w.shape), weights),
    )
    dx, dgates, dweights = _for_all_pieces(work, width, add, begin)
    dweights = jax.tree.map(lambda d, w: d.astype(w.dtype), dweights, weights)
    return dx.astype(x.dtype), dgates.reshape(gates.shape), dweights, None


_weighted_sum.defvjp(_forward, _backward)


def _for_all_pieces(work: Sorted, width: int, body: Callable, begin):
    def step(carry):
        return carry[0] + 1, body(*carry)

    start = work.ends[-1] * 0  # differs between devices, as the number of pieces does
    return jax.lax.while_loop(lambda c: c[0] * width < work.ends[-1], step, (start, begin))[1]


def _piece(work: Sorted, width: int, number: jax.Array) -> tuple[jax.Array, Piece]:
    """Returns (which (token, choice) each row is, int32 [c], the piece)."""
    begin = number * width
    rows = jax.lax.dynamic_slice_in_dim(work.order, begin, width)
    sizes = jnp.diff(jnp.clip(work.ends - begin, 0, width), prepend=0)
    real = jnp.arange(width) < work.ends[-1] - begin
    return rows, Piece(real, jnp.where(real, work.expert[rows], 0), sizes)


def _part(compute: Compute, h, gates, weights, piece: Piece) -> jax.Array:
    """gate · expert(h), float32 [c, D]; 0 in rows that are not real, whatever a product left."""
    real = piece.real[:, None]
    y = compute(weights, jnp.where(real, h, 0), piece)
    return jnp.where(real, y.astype(jnp.float32) * gates.astype(jnp.float32)[:, None], 0)
