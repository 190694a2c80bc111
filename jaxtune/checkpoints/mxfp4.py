"""MXFP4 tensors, as gpt-oss was released: read as the numbers that they stand for.

A tensor X [E, in, out] is held as X_blocks uint8 [E, out, in / 32, 16], two numbers a byte, the
first in the low half, and X_scales uint8 [E, out, in / 32], exponents of two with a bias of 127
(OCP Microscaling Formats specification 1.0, E2M1 with E8M0 scales).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxtune.checkpoints.safetensors import Entry, TensorFile
from jaxtune.core.errors import RequestError

BLOCKS, SCALES, BLOCK = "_blocks", "_scales", 32
BFLOAT16, BYTE = np.dtype(ml_dtypes.bfloat16), np.dtype(np.uint8)
POSITIVE = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], np.float32)
VALUES = np.concatenate([POSITIVE, -POSITIVE])


@dataclasses.dataclass(frozen=True)
class Mxfp4File:
    """One tensor, read as a `TensorFile` reads its own.

    Attributes:
        blocks, scales: the files that hold X_blocks and X_scales.
        entries: {X: Entry}, of dtype bfloat16, which holds every such number.
    """

    blocks: TensorFile
    scales: TensorFile
    entries: dict[str, Entry]

    @property
    def path(self) -> Path:
        """The file of the blocks."""
        return self.blocks.path

    def read(
        self, name: str, index: tuple[Any, ...] = (), out: np.ndarray | None = None
    ) -> np.ndarray:
        """Returns X, or the part that `index` names (slices, and places of the last dimension)."""
        shape = self.entries[name].shape
        experts, inner, outer = (*index, *(slice(None),) * (3 - len(index)))
        numbers = [np.arange(n)[i] for n, i in zip(shape, (experts, inner, outer), strict=True)]
        if out is None:
            out = np.empty([len(part) for part in numbers], BFLOAT16)
        for place, expert in enumerate(numbers[0]):
            blocks = self.blocks.read(name + BLOCKS, (expert, outer))
            scales = self.scales.read(name + SCALES, (expert, outer))
            out[place] = dequantised(blocks, scales)[:, inner].T
        return out


def dequantised(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Returns float32 [..., 32 G] for blocks uint8 [..., G, 16] and scales uint8 [..., G]."""
    values = np.stack([VALUES[blocks & 15], VALUES[blocks >> 4]], axis=-1)
    values = values.reshape(*scales.shape, BLOCK)
    exponents = scales.astype(np.int32)[..., None] - 127
    return np.ldexp(values, exponents).reshape(*scales.shape[:-1], -1)


def with_mxfp4(files: Mapping[str, TensorFile]) -> dict[str, TensorFile | Mxfp4File]:
    """Returns {tensor name: its file} with X in place of each X_blocks and X_scales.

    Raises:
        RequestError: the two do not belong together.
    """
    found: dict[str, TensorFile | Mxfp4File] = dict(files)
    for stored in files:
        name = stored.removesuffix(BLOCKS)
        if name == stored or name + SCALES not in files:
            continue
        blocks, scales = found.pop(name + BLOCKS), found.pop(name + SCALES)
        a, b = blocks.entries[name + BLOCKS], scales.entries[name + SCALES]
        if a.dtype != BYTE or b.dtype != BYTE or len(a.shape) != 4 or a.shape != (*b.shape, 16):
            raise RequestError(
                f"{stored!r} {list(a.shape)} and {name + SCALES!r} {list(b.shape)} are not the "
                "bytes of one MXFP4 tensor",
                where=blocks.path,
            )
        count, outer, groups, _ = a.shape
        entry = Entry(BFLOAT16, (count, BLOCK * groups, outer), 0)
        found[name] = Mxfp4File(blocks, scales, {name: entry})
    return found
