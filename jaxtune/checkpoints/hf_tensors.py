"""The tensors of a Hugging Face directory, in one safetensors file or many, by name."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxtune.checkpoints.mxfp4 import Mxfp4File, with_mxfp4
from jaxtune.checkpoints.safetensors import TensorFile, open_tensors
from jaxtune.core.errors import RequestError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def read_json(path: Path) -> dict[str, Any]:
    """Returns the object in a JSON file.

    Raises:
        RequestError: the file is missing, or no JSON object; a syntax error names the line.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise RequestError("no such file", where=path) from error
    except (ValueError, RecursionError) as error:  # also text that is not UTF-8, and deep nesting
        line = getattr(error, "lineno", 1)
        raise RequestError("not valid JSON", where=f"{path}:{line}") from error
    if not isinstance(value, dict):
        raise RequestError("not a JSON object", where=path)
    return value


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """The tensors of a directory, in one file or many.

    Attributes:
        where: model.safetensors or the index, for messages.
        files: {tensor name: the file that holds it}.
        stored: {tensor name: its name in that file}, where the two differ.
    """

    where: Path
    files: dict[str, TensorFile | Mxfp4File]
    stored: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def stored_name(self, name: str) -> str:
        """Returns a tensor's name in its file."""
        return self.stored.get(name, name)

    def dtype(self, name: str) -> np.dtype:
        """Returns a tensor's dtype."""
        return self.files[name].entries[self.stored_name(name)].dtype

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns a tensor's shape."""
        return self.files[name].entries[self.stored_name(name)].shape

    def read(
        self, name: str, index: tuple[Any, ...] = (), out: np.ndarray | None = None
    ) -> np.ndarray:
        """Returns a copy of a tensor, or of a part of it; in `out` if given."""
        return self.files[name].read(self.stored_name(name), index, out)

    def renamed(self, patterns: Sequence[tuple[str, str]]) -> Checkpoint:
        """Returns the checkpoint under the names that a family's table has.

        Args:
            patterns: (regex of a whole name, what replaces it) of older spellings.
        """
        files, stored = dict(self.files), {}
        for name in self.files:
            for pattern, replacement in patterns:
                ours = re.sub(f"^{pattern}$", replacement, name)
                if ours != name and ours not in files:
                    files[ours], stored[ours] = files.pop(name), name
                    break
        return Checkpoint(self.where, files, stored)


def open_checkpoint(directory: str | os.PathLike[str]) -> Checkpoint:
    """Opens the safetensors of a model directory; only headers are read.

    Raises:
        RequestError: no safetensors, a missing or damaged file, or an index that names tensors
            which its files lack.
    """
    directory = Path(directory)
    single, index = directory / WEIGHTS, directory / INDEX
    if single.is_file():
        file = open_tensors(single)
        return Checkpoint(single, with_mxfp4(dict.fromkeys(file.entries, file)))
    if not index.is_file():
        others = sorted(p.name for p in directory.glob("*") if p.suffix in (".bin", ".pt", ".pth"))
        hint = ""
        if others:
            hint = f"; {others[0]} is a pickle, which is never loaded: convert it to safetensors"
        raise RequestError(
            f"the directory holds no {WEIGHTS} and no {INDEX}{hint}", where=directory
        )
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise RequestError("the index has no weight_map", where=index)
    opened: dict[str, TensorFile] = {}
    for name in sorted({str(name) for name in weight_map.values()}):
        if Path(name).name != name:
            raise RequestError(f"the index names a file elsewhere: {name!r}", where=index)
        if not (directory / name).is_file():
            raise RequestError(f"the index names a shard that is missing: {name}", where=index)
        opened[name] = open_tensors(directory / name)
    # tensors that a shard holds beside the index count too: a stray one is then refused by name
    files = {tensor: file for file in opened.values() for tensor in file.entries}
    for tensor, name in weight_map.items():
        if tensor not in opened[name].entries:
            raise RequestError(
                f"the index puts {tensor!r} into {name}, which lacks it", where=index
            )
        files[tensor] = opened[name]
    return Checkpoint(index, with_mxfp4(files))
