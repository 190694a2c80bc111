"""Loads a checkpoint and prints [bytes of the model, by how much the process grew at the most].

    python -m tests.checkpoints.load_memory SMALL DIRECTORY [QUANTIZE]

SMALL is loaded first, so that imports and the runtime's own memory do not count.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import jax
import numpy as np

from jaxtune.parallel.mesh import make_mesh
from jaxtune.recipes.base import from_hf


def memory(field: str) -> int:
    """A field of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


def load(directory: str, quantize: str):
    mesh = make_mesh({"data": 1, "fsdp": jax.device_count()})
    base = from_hf(Path(directory))
    return jax.block_until_ready(base.load(lambda _: np.dtype("float32"), mesh, quantize))


if __name__ == "__main__":
    small, directory, quantize = (*sys.argv[1:], "none")[:3]
    load(small, quantize)
    before = memory("VmRSS")
    params = load(directory, quantize)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    print(json.dumps([size, memory("VmHWM") - before]))
