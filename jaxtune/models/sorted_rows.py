"""Rows sorted by expert and back, with gathers in both directions of differentiation."""

from __future__ import annotations

import jax


# The transpose of a gather is a scatter that adds, slow on TPUs and with room of its own in memory.
# Each row of an order is taken once, so that the transpose is a gather as well.
@jax.custom_vjp
def sorted_rows(x: jax.Array, order: jax.Array, place: jax.Array) -> jax.Array:
    """Returns each token [n, D] once for each of its k choices, sorted: x[order // k], [n k, D].

    Args:
        x: [n, D].
        order: int32 [n k], which (token, choice) each row is.
        place: int32 [n k], in which row each (token, choice) is: the inverse of `order`.
    """
    return x[order // (order.size // x.shape[0])]


def _sorted_forward(x, order, place):
    return sorted_rows(x, order, place), (place, x.shape)


def _sorted_backward(kept, dh):
    place, (n, width) = kept
    return dh[place].reshape(n, -1, width).sum(1), None, None


@jax.custom_vjp
def unsorted_rows(h: jax.Array, order: jax.Array, place: jax.Array) -> jax.Array:
    """Returns h[place], [n k, D]: rows in the order of (token, choice) again; see `sorted_rows`."""
    return h[place]


def _unsorted_forward(h, order, place):
    return h[place], order


def _unsorted_backward(order, dgiven):
    return dgiven[order], None, None


sorted_rows.defvjp(_sorted_forward, _sorted_backward)
unsorted_rows.defvjp(_unsorted_forward, _unsorted_backward)
