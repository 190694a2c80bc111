"""Safetensors files, by slices: read through a memory map, written a tensor at a time.

The library reads bfloat16 into numpy only in its newer versions, and writes only from a dict that
holds everything. Format: https://huggingface.co/docs/safetensors, 8 bytes of header length, a JSON
header, and the tensors without gaps.
"""

from __future__ import annotations

import dataclasses
import json
import math
import mmap
import operator
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxtune.core.errors import RequestError

DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclasses.dataclass(frozen=True)
class Entry:
    """One tensor of a file: its dtype, shape, and place behind the header in bytes."""

    dtype: np.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def nbytes(self) -> int:
        """Size of the tensor in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class TensorFile:
    """An open file; nothing but the header has been read.

    Attributes:
        path: the file.
        entries: {tensor name: Entry}.
        start: of what follows the header, in bytes.
        pages: memory map of the file, or None where nothing follows the header.
    """

    path: Path
    entries: dict[str, Entry]
    start: int
    pages: mmap.mmap | None = dataclasses.field(repr=False)

    def read(
        self, name: str, index: tuple[Any, ...] = (), out: np.ndarray | None = None
    ) -> np.ndarray:
        """Returns a copy of a tensor, or of the part that `index` names; in `out` if given."""
        entry = self.entries[name]
        if not entry.nbytes:
            part = np.empty(entry.shape, entry.dtype)[index]
            return part if out is None else out
        first = self.start + entry.start
        raw = np.frombuffer(self.pages, np.uint8, entry.nbytes, first)
        part = raw.view(entry.dtype).reshape(entry.shape)[index]
        if out is None:
            out = np.array(part)
        else:
            out[...] = part
        del raw, part
        # Pages that were read would count as this process's memory until the file is closed.
        page = first // mmap.PAGESIZE * mmap.PAGESIZE
        self.pages.madvise(mmap.MADV_DONTNEED, page, first + entry.nbytes - page)
        return out


def open_tensors(path: str | os.PathLike[str]) -> TensorFile:
    """Opens a file and checks its header against its size.

    Raises:
        RequestError: the file is missing, truncated or damaged.
    """
    path = Path(path)
    if not path.is_file():
        raise RequestError("no such file", where=path)
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if start == b"version ":
            raise RequestError("a Git LFS pointer; fetch the file itself", where=path)
        if size < 8 or length > size - 8:
            raise RequestError(
                f"not a whole safetensors file: its {size} bytes end inside the header", where=path
            )
        text = file.read(length)
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:  # also what is not UTF-8, and deep nesting
        raise RequestError("not a safetensors file: its header is no JSON", where=path) from error
    if not isinstance(header, dict):
        raise RequestError("not a safetensors file: its header is no JSON object", where=path)
    header.pop("__metadata__", None)
    entries = {name: _entry(name, fields, path) for name, fields in header.items()}
    _check_cover(entries, size - 8 - length, path)
    if size == 8 + length:
        return TensorFile(path, entries, 8 + length, None)
    with path.open("rb") as file:
        pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    return TensorFile(path, entries, 8 + length, pages)


def _entry(name: str, fields: Any, path: Path) -> Entry:
    try:
        kind, shape = fields["dtype"], tuple(operator.index(n) for n in fields["shape"])
        start, stop = (operator.index(n) for n in fields["data_offsets"])
    except (KeyError, TypeError, ValueError) as error:
        raise RequestError(f"damaged: tensor {name!r} is described wrongly", where=path) from error
    if not isinstance(kind, str) or kind not in DTYPES:
        raise RequestError(f"tensor {name!r} has dtype {kind!r}, which cannot be read", where=path)
    entry = Entry(DTYPES[kind], shape, start)
    if min((*shape, start), default=0) < 0 or stop - start != entry.nbytes:
        raise RequestError(f"damaged: tensor {name!r} does not fill its bytes", where=path)
    return entry


def _check_cover(entries: Mapping[str, Entry], size: int, path: Path) -> None:
    place = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].nbytes)):
        if entry.start != place:
            raise RequestError(f"damaged: tensor {name!r} overlaps or leaves a gap", where=path)
        place += entry.nbytes
    if place != size:
        what = "truncated" if size < place else "damaged"
        raise RequestError(
            f"{what}: the header promises {place} bytes of tensors, the file has {size}", where=path
        )


class TensorWriter:
    """Writes a file whose tensors come in any order; a context manager.

    Args:
        path: the new file.
        shapes: {name: (dtype, shape)} of everything that will be written.
    """

    def __init__(
        self, path: str | os.PathLike[str], shapes: Mapping[str, tuple[np.dtype, tuple[int, ...]]]
    ):
        self.path, self.entries, place = Path(path), {}, 0
        # transformers refuses a file that does not say which framework's layout it has
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        for name, (dtype, shape) in shapes.items():
            entry = Entry(np.dtype(dtype), tuple(shape), place)
            self.entries[name], place = entry, place + entry.nbytes
            header[name] = {
                "dtype": NAMES[entry.dtype],
                "shape": list(shape),
                "data_offsets": [entry.start, place],
            }
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # tensors start aligned
        self.offset, self.missing = 8 + len(text), set(self.entries)
        self.file = self.path.open("wb")
        self.file.write(len(text).to_bytes(8, "little") + text)

    def write(self, name: str, tensor: np.ndarray) -> None:
        """Writes one tensor, cast to its declared dtype.

        Raises:
            ValueError: the shape is not the declared one, or the tensor has been written.
        """
        entry = self.entries[name]
        if tuple(tensor.shape) != entry.shape:
            raise ValueError(f"{name} has shape {tensor.shape}, declared was {entry.shape}")
        if name not in self.missing:
            raise ValueError(f"{name} is written twice")
        self.missing.discard(name)
        self.file.seek(self.offset + entry.start)
        self.file.write(np.ascontiguousarray(tensor, entry.dtype).tobytes())

    def __enter__(self) -> TensorWriter:
        return self

    def __exit__(self, kind, error, trace) -> None:
        if kind is None:
            self.file.flush()
            os.fsync(self.file.fileno())
        self.file.close()
        if kind is None and self.missing:
            raise ValueError(f"{sorted(self.missing)[0]} was never written")
