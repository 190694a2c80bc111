"""Our own layout of an adapter, which holds every method; documented in docs/export.md.

`jaxtune_adapter.json` says the method, `jaxtune_adapter.safetensors` holds its leaves: float32, by
their paths, a tensor for all layers.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxtune.checkpoints.hf import FLOATS
from jaxtune.checkpoints.hf_directory import replaced
from jaxtune.checkpoints.hf_export import gather, write_json
from jaxtune.checkpoints.hf_tensors import read_json
from jaxtune.checkpoints.safetensors import TensorWriter, open_tensors
from jaxtune.core.errors import RequestError
from jaxtune.core.tree import Tree, flatten
from jaxtune.models.config import ModelConfig
from jaxtune.models.decoder import abstract_params
from jaxtune.peft.method import FROZEN, SCORE, Method, labels
from jaxtune.peft.registry import method_of_spec, spec_of

CONFIG, WEIGHTS = "jaxtune_adapter.json", "jaxtune_adapter.safetensors"
FORMAT = 1


def leaf_shapes(config: ModelConfig, method: Method) -> dict[str, tuple[int, ...]]:
    """Returns {path: shape} of what a method adds to a model or trains in it."""
    shapes = abstract_params(config, method)
    kinds = flatten(labels(method, shapes))
    return {path: x.shape for path, x in flatten(shapes).items() if kinds[path] != FROZEN}


def is_native(directory: str | os.PathLike[str]) -> bool:
    """Tells whether a directory holds an adapter in our own layout."""
    return (Path(directory) / CONFIG).is_file()


def read_method(directory: str | os.PathLike[str]) -> Method:
    """Returns the Method of a directory.

    Raises:
        RequestError: the file is damaged, or of a newer version.
    """
    where = Path(directory) / CONFIG
    fields = read_json(where)
    if fields.get("format") != FORMAT:
        raise RequestError(f"{fields.get('format')!r} is not {FORMAT}", key="format", where=where)
    try:
        return method_of_spec(fields["method"])
    except (KeyError, TypeError, AttributeError) as error:
        raise RequestError("names no method of this version", key="method", where=where) from error


def has_head(directory: str | os.PathLike[str]) -> bool:
    """Tells whether an adapter has leaves of the head."""
    file = open_tensors(Path(directory) / WEIGHTS)
    return any(path.startswith("lm_head/") for path in file.entries)


def has_score(directory: str | os.PathLike[str]) -> bool:
    """Tells whether an adapter has a score head."""
    return SCORE in open_tensors(Path(directory) / WEIGHTS).entries


def load_adapter(
    directory: str | os.PathLike[str], config: ModelConfig, method: Method
) -> dict[str, np.ndarray]:
    """Returns {path: float32 array} of what the method adds to the base, or trained in it.

    A reward model may start from the adapter of a language model, which has no score head.

    Raises:
        RequestError: a tensor is missing, superfluous, misshapen or no float, by name.
    """
    file = open_tensors(Path(directory) / WEIGHTS)
    wanted = leaf_shapes(config, method)
    if SCORE not in file.entries:
        wanted.pop(SCORE, None)
    for path in (*wanted, *file.entries):
        entry = file.entries.get(path)
        if entry is None:
            raise RequestError(f"tensor {path!r} is missing", where=file.path)
        if path not in wanted:
            raise RequestError(
                f"tensor {path!r} has no place in method {method.name!r} on this model",
                where=file.path,
            )
        if entry.shape != wanted[path] or entry.dtype.name not in FLOATS:
            raise RequestError(
                f"{path!r} is {entry.dtype.name}{list(entry.shape)}; method and base want a float "
                f"of shape {list(wanted[path])}",
                where=file.path,
            )
    return {path: file.read(path).astype(np.float32) for path in wanted}


def save_adapter(
    directory: str | os.PathLike[str],
    config: ModelConfig,
    method: Method,
    params: Tree,
    base_name: str,
) -> None:
    """Writes an adapter of any method; an older export is replaced at the end.

    With several hosts all must call it, and the first writes.

    Args:
        directory: new, or holding an export.
        config: of the base.
        method: the method of the run.
        params: nested dict with at least what the method adds or trains.
        base_name: path or name of the base model.

    Raises:
        RequestError: the method adds and trains nothing, or new tokens, or a parameter is missing.
    """
    shapes, flat = leaf_shapes(config, method), flatten(params)
    if not shapes or (method.name == "full" and not method.train):
        raise RequestError("there is no adapter to write; export format 'hf'", key="format")
    if method.new_rows is not None:
        raise RequestError(
            "an adapter cannot hold the rows of new tokens, which its base lacks; export format "
            "'hf'",
            key="format",
        )
    absent = [path for path in shapes if path not in flat]
    if absent:
        raise RequestError(f"parameter {absent[0]!r} is missing")
    if jax.process_index() != 0:
        for path in shapes:  # takes part in gathering
            gather(flat[path])
        return
    fields: Mapping[str, Any] = {
        "format": FORMAT,
        "method": spec_of(method),
        "base_model_name_or_path": base_name,
    }
    with replaced(directory) as aside:
        entries = {path: (np.dtype(np.float32), shape) for path, shape in shapes.items()}
        with TensorWriter(aside / WEIGHTS, entries) as writer:
            for path in shapes:
                writer.write(path, gather(flat[path]))
        write_json(aside / CONFIG, fields)
