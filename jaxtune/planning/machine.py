"""The devices of this machine, as a chip of the table or as measured."""

from __future__ import annotations

import os
import time

import jax
import jax.numpy as jnp

from jaxtune.planning import chips

SIDE = 1024  # of the measured matrix product
ELEMENTS = 2**24  # of the measured copy
REPEATS = 5


def this_machine() -> tuple[int, chips.Chip]:
    """Returns (count, chip) of JAX's devices here.

    Devices that the table does not have, such as a CPU, are measured: a product of two matrices
    and a copy, the best of a few. Several devices of one processor share it and its memory.
    """
    devices = jax.devices()
    chip = chips.of_device_kind(devices[0].device_kind)
    return len(devices), chip or measured(devices[0].device_kind, len(devices))


def measured(name: str, count: int) -> chips.Chip:
    """Returns what one of `count` devices of this machine can do, without a price."""
    square = jnp.ones((SIDE, SIDE), jnp.float32)
    flops = 2 * SIDE**3 / _seconds(jax.jit(jnp.matmul), square, square)
    line = jnp.ones(ELEMENTS, jnp.float32)
    rate = 2 * line.nbytes / _seconds(jax.jit(lambda x: x + 1), line)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return chips.Chip(
        name,
        flops / count,
        memory // count,
        rate / count,
        rate / count,
        rate / count,
        count,
        None,
        "measured here",
        None,
    )


def _seconds(function, *arguments: jax.Array) -> float:
    function(*arguments).block_until_ready()
    best = float("inf")
    for _ in range(REPEATS):
        started = time.perf_counter()
        function(*arguments).block_until_ready()
        best = min(best, time.perf_counter() - started)
    return best
