"""Attention back ends beside each other: memory and time of one layer, forward and backward.

    python -m benchmarks.attention                                  # this machine's devices
    python -m benchmarks.attention --tokens=512,2048 --rounds=5
    python -m benchmarks.attention --topology=v5e:2x2 --devices=4   # compiled for TPU: memory only

Memory is XLA's count of temporaries on one device. Back ends take turns in one process, so that a
busy machine slows all of them; times are given as parts of `xla`'s. With several devices the tokens
of `ring` are spread over them, and the other back ends have one.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from benchmarks.page import table

MIB = 2**20


@dataclasses.dataclass
class Contestant:
    """A back end at one length.

    Attributes:
        name, tokens: of its row.
        memory: bytes of temporaries on a device.
        run: computes gradients once; None where the program is for devices that are not here.
        seconds: of each run.
    """

    name: str
    tokens: int
    memory: int
    run: Callable[[], Any] | None
    seconds: list[float] = dataclasses.field(default_factory=list)


def contestant(name: str, tokens: int, devices: Sequence[Any], options: Any) -> Contestant:
    """Returns a back end compiled for rows of `tokens`, two segments each.

    Args:
        name: of `attention_backends.BACKENDS`.
        tokens: T.
        devices: those of the mesh; described ones compile but do not run.
        options: heads, groups, size, window, dtype of the arrays.
    """
    import jax
    import jax.numpy as jnp

    from jaxtune.models.attention import Span, Where, visible
    from jaxtune.models.attention_backends import BACKENDS
    from jaxtune.parallel.mesh import make_mesh
    from jaxtune.parallel.rules import batch_sharding

    backend = BACKENDS[name]
    mesh = make_mesh({"sequence": len(devices)}, devices)
    spread = batch_sharding(mesh)

    def loss(q, k, v, segments, positions):
        span = Span(segments, positions)
        seen = visible(span, span, options.window) if backend.reads_mask else None
        y = backend.attend(q, k, v, Where(span, span, options.window, seen))
        return jnp.sum(jnp.square(y.astype(jnp.float32)))

    shapes = [(1, tokens, n, options.size) for n in (options.heads, options.groups, options.groups)]
    states = [jax.ShapeDtypeStruct(s, options.dtype, sharding=spread) for s in shapes]
    ids = jax.ShapeDtypeStruct((1, tokens), jnp.int32, sharding=spread)
    with jax.set_mesh(mesh):
        compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*states, ids, ids).compile()
    memory = compiled.memory_analysis().temp_size_in_bytes
    if options.topology:
        return Contestant(name, tokens, memory, None)
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal(shape.shape, np.float32).astype(shape.dtype) for shape in states]
    place = np.arange(tokens, dtype=np.int32)[None]
    second = (place >= tokens // 2).astype(np.int32)
    arrays += [1 + second, place - second * (tokens // 2)]
    arrays = [jax.device_put(array, spread) for array in arrays]
    return Contestant(name, tokens, memory, lambda: jax.block_until_ready(compiled(*arrays)))


def contest(options: Any) -> list[Contestant]:
    """Returns the back ends that the devices can run, measured in turns."""
    import jax

    if options.topology:
        from jax.experimental import topologies

        devices = list(topologies.get_topology_desc(options.topology, "tpu").devices)
    else:
        devices = jax.devices()
    devices = devices[: options.devices]
    kernel = {"tpu": ["splash"], "gpu": ["cudnn"]}.get(devices[0].platform, [])
    found = []
    for tokens in options.tokens:
        for name in ("xla", *kernel, "ring"):
            given = devices if name == "ring" else devices[:1]
            found.append(contestant(name, tokens, given, options))
    for round_ in range(options.rounds + 1 if not options.topology else 0):
        for each in found:
            started = time.perf_counter()
            each.run()
            if round_:  # the first one warms up
                each.seconds.append(time.perf_counter() - started)
    return found


def rows(found: Sequence[Contestant]) -> list[list[str]]:
    """Returns the lines of the table."""
    base = {each.tokens: each for each in found if each.name == "xla"}
    lines = []
    for each in found:
        first = base[each.tokens]
        line = [f"{each.tokens:,}", each.name, f"{each.memory / MIB:,.1f}"]
        line.append(f"{each.memory / first.memory:.3f}")
        if each.seconds:
            seconds = statistics.median(each.seconds)
            line.append(f"{seconds / statistics.median(first.seconds):.2f}")
        lines.append(line)
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", default="512,2048", help="lengths of a row")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--groups", type=int, default=2, help="key heads")
    parser.add_argument("--size", type=int, default=128, help="of a head")
    parser.add_argument("--window", type=int, default=None)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--topology", default=None, help="of a TPU that is not here")
    options = parser.parse_args(argv)
    options.tokens = [int(n) for n in options.tokens.split(",")]
    if options.topology:
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
        os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
    found = rows(contest(options))
    head = ["tokens", "back end", "MiB a device", "of xla's"]
    head += ["time of xla's"] if len(found[0]) > 4 else []
    print(table(head, found), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
