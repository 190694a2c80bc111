"""The real training step, compiled for devices that are not there."""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
from jax.sharding import Mesh

from jaxtune.planning import collectives, hlo, products

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler planned for one device.

    Attributes:
        argument_bytes, temp_bytes, output_bytes, code_bytes: of memory; outputs are those that do
            not take the place of an argument. All but the total are 0 if it does not fit.
        total_bytes: what the program needs.
        fits: whether the compiler found room for it.
        compile_seconds: of tracing, lowering and compiling.
        flops: of one device's matrix products, each as often as it runs; kernels are not seen.
        optimal_seconds: the compiler's own estimate of a step, as it stands.
        collectives: those of the program, None if it does not fit.
        uncounted_loops: loops that run as often as the data say, counted as if they ran once: what
            is inside them is in `flops` and `collectives` once.
    """

    argument_bytes: int
    temp_bytes: int
    output_bytes: int
    code_bytes: int
    total_bytes: int
    fits: bool
    compile_seconds: float
    flops: int
    optimal_seconds: float | None
    collectives: tuple[collectives.Collective, ...] | None
    uncounted_loops: int = 0


def compile_step(
    step: Callable, arguments: tuple[Any, ...], mesh: Mesh, quick: bool = False
) -> Compiled:
    """Compiles a jitted step for the devices of a mesh.

    Args:
        step: as `training.compile.jit_step` returns it.
        arguments: its abstract arguments, with shardings.
        mesh: of devices that need not exist.
        quick: spends the least effort on a fast program: several times sooner done, but not the
            program of a run; its memory may be a quarter off.
    """
    started = time.perf_counter()
    try:
        with jax.set_mesh(mesh), effort(LEAST if quick else None):
            program = step.lower(*arguments).compile()
    except jax.errors.JaxRuntimeError as error:
        needed = needed_bytes(str(error))
        if needed is None:
            raise
        seconds = time.perf_counter() - started
        return Compiled(0, 0, 0, 0, needed, False, seconds, 0, None, None)
    seconds = time.perf_counter() - started
    stats = program.memory_analysis()
    cost = program.cost_analysis() or {}
    cost = cost[0] if isinstance(cost, list) else cost
    fresh = stats.output_size_in_bytes - stats.alias_size_in_bytes
    sizes = (
        stats.argument_size_in_bytes,
        stats.temp_size_in_bytes,
        fresh,
        stats.generated_code_size_in_bytes,
    )
    module = hlo.parse(program.as_text())
    return Compiled(
        *sizes,
        total_bytes=sum(sizes),
        fits=True,
        compile_seconds=seconds,
        flops=products.flops(module),
        optimal_seconds=cost.get("optimal_seconds"),
        collectives=tuple(collectives.collectives(module)),
        uncounted_loops=len(module.uncounted),
    )


LEAST = -1.0


@contextmanager
def effort(value: float | None) -> Iterator[None]:
    """Sets how much XLA does for a program's speed, from -1 to 1; None leaves it."""
    before = jax.config.jax_exec_time_optimization_effort
    if value is not None:
        jax.config.update("jax_exec_time_optimization_effort", value)
    try:
        yield
    finally:
        jax.config.update("jax_exec_time_optimization_effort", before)


def needed_bytes(message: str) -> int | None:
    """Returns how much memory a program needed that the compiler refused, or None.

    >>> needed_bytes("Ran out of memory in memory space hbm. Used 20.98G of 15.75G hbm.")
    22527103467
    >>> needed_bytes("the total memory required (2G) exceeds available HBM (1.5G).")
    2147483648
    """
    match = re.search(r"[Uu]sed ([\d.]+)([KMGT]?) of [\d.]+[KMGT]? hbm", message) or re.search(
        r"memory required .*?\(([\d.]+)([KMGT]?)\) exceeds available HBM", message
    )
    return None if match is None else int(float(match[1]) * _UNITS[match[2]])
