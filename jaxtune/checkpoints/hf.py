"""Hugging Face model directories in: config.json and safetensors, read by slices."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.checkpoints.hf_tensors import INDEX, WEIGHTS, Checkpoint, open_checkpoint, read_json
from jaxtune.checkpoints.quantized_load import quantized_param
from jaxtune.core.errors import RequestError
from jaxtune.core.quantize import ABSMAX, CODES
from jaxtune.core.tree import Tree, flatten, unflatten
from jaxtune.models.config import ModelConfig
from jaxtune.models.decoder import abstract_params
from jaxtune.models.families import registry
from jaxtune.models.families.table import Weight, rows
from jaxtune.peft.method import Method

FLOATS = ("float64", "float32", "float16", "bfloat16")
EMBEDDING, HEAD = "embed/embedding", "lm_head/kernel"

Dtypes = Any  # a dtype, a function of the path, or a tree of dtypes


def read_config(directory: str | os.PathLike[str]) -> tuple[ModelConfig, dict[str, Any]]:
    """Returns the ModelConfig of a directory, and its config.json as parsed.

    A checkpoint that says its embeddings are tied, but holds a head of its own that differs, is
    read as untied: the stored head is the one that was trained.

    Args:
        directory: holds config.json; weights are looked at only to see whether the head is tied.

    Raises:
        RequestError: the directory or config.json is missing, damaged or not supported.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise RequestError("no such model directory", where=directory)
    if not (directory / "config.json").is_file():
        hint = ""
        if (directory / "adapter_config.json").is_file():
            hint = "; it is a PEFT adapter: name its base as the model, and it as the adapter"
        raise RequestError(f"the directory holds no config.json{hint}", where=directory)
    raw = read_json(directory / "config.json")
    config = registry.from_hf(raw, directory / "config.json")
    if config.tie_embeddings and any((directory / name).is_file() for name in (WEIGHTS, INDEX)):
        checkpoint = open_checkpoint(directory).renamed(registry.family(config.family).renamed)
        if not head_is_tied(config, checkpoint):
            config = dataclasses.replace(config, tie_embeddings=False)
    return config, raw


def head_is_tied(config: ModelConfig, checkpoint: Checkpoint, block: int = 8192) -> bool:
    """Tells whether a tied model's file has no head of its own, or one equal to the embedding.

    Compares `block` rows at a time.
    """
    table = {w.path: w.name for w in registry.family(config.family).table(config)}
    names = table[HEAD], table[EMBEDDING]
    if any(name not in checkpoint.files for name in names):
        return True
    if checkpoint.shape(names[0]) != checkpoint.shape(names[1]):
        return False
    for start in range(0, config.vocab_size, block):
        head, table_rows = (checkpoint.read(n, (slice(start, start + block),)) for n in names)
        if not np.array_equal(head.astype(np.float32), table_rows.astype(np.float32)):
            return False
    return True


def load_params(
    directory: str | os.PathLike[str],
    config: ModelConfig,
    *,
    dtypes: Dtypes,
    shardings: Tree | None = None,
) -> Tree:
    """Loads the base model's parameters; each host reads only the slices that its devices hold.

    Args:
        directory: a Hugging Face directory with safetensors.
        config: what `read_config` gave for it; of its run fields only `quantize` matters.
        dtypes: of the result: one dtype, a function path → dtype, or a tree of dtypes.
        shardings: a tree of jax.sharding.Sharding, or None for one device.

    Returns:
        The nested dict of jax arrays with the structure of `abstract_params(config, Method())`.

    Raises:
        RequestError: a tensor is missing, superfluous, misshapen or no float, by name, or a file
            is missing or damaged.
    """
    shapes = flatten(abstract_params(config.unquantized, Method()))
    wanted = flatten(abstract_params(config, Method()))
    checkpoint, table = checked(directory, config, shapes)
    dtype_of = _dtype_function(dtypes)
    placed = {} if shardings is None else flatten(shardings)
    default = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def load(path: str, shape: tuple[int, ...]) -> jax.Array:
        read = reader(checkpoint, table[path], shape, np.dtype(dtype_of(path)))
        return place(shape, placed.get(path, default), read)

    def quantized(path: str, shape: tuple[int, ...]) -> dict[str, jax.Array]:
        def layer_of(number: int) -> Callable[[tuple[slice, ...]], np.ndarray]:
            read = reader(checkpoint, table[path], shape, np.dtype(np.float32))
            return lambda index: read((slice(number, number + 1), *index))[0]

        names = {name: f"{path}/{name}" for name in (CODES, ABSMAX)}
        leaves = {name: wanted[full] for name, full in names.items()}
        places = {name: placed.get(full, default) for name, full in names.items()}
        made = quantized_param(layer_of, shape, config.quantize, leaves, places)
        return {names[name]: leaf for name, leaf in made.items()}

    params: dict[str, jax.Array] = {}
    for path, leaf in shapes.items():
        whole = path in wanted
        params |= {path: load(path, leaf.shape)} if whole else quantized(path, leaf.shape)
    return unflatten({path: params[path] for path in wanted})


def place(
    shape: tuple[int, ...],
    sharding: jax.sharding.Sharding,
    read: Callable[[tuple[slice, ...]], np.ndarray],
) -> jax.Array:
    """Returns the array whose parts `read` gives.

    One part at a time: what was read is on its devices, and freed, before the next is read, so that
    a host with several devices never holds the parts of all. Devices that hold the same part share
    one read.
    """
    owners: dict[tuple, list[jax.Device]] = {}
    indices = sharding.addressable_devices_indices_map(shape)
    for device, index in indices.items():
        bounds = tuple(s.indices(n)[:2] for s, n in zip(index, shape, strict=True))
        owners.setdefault(bounds, []).append(device)
    parts = []
    for devices in owners.values():
        host = read(indices[devices[0]])
        parts += jax.block_until_ready([jax.device_put(host, device) for device in devices])
        del host
    return jax.make_array_from_single_device_arrays(shape, sharding, parts)


def checked(
    directory: str | os.PathLike[str],
    config: ModelConfig,
    shapes: Mapping[str, jax.ShapeDtypeStruct],
) -> tuple[Checkpoint, dict[str, Weight]]:
    """Returns (tensors, {path: row of the family's table}) of a directory whose headers fit.

    Only headers and sizes of the files are read.

    Raises:
        RequestError: as `load_params`.
    """
    family = registry.family(config.family)
    table = rows(family.table(config), shapes)
    checkpoint = open_checkpoint(directory).renamed(family.renamed)
    check_tensors(config, checkpoint, table, shapes)
    return checkpoint, table


def check_headers(directory: str | os.PathLike[str], config: ModelConfig) -> None:
    """Raises the RequestError of `load_params` unless the tensors of a directory fit a config."""
    checked(directory, config, flatten(abstract_params(config.unquantized, Method())))


def _dtype_function(dtypes: Dtypes) -> Callable[[str], Any]:
    if isinstance(dtypes, Mapping):
        return flatten(dtypes).__getitem__
    if callable(dtypes) and not isinstance(dtypes, type):
        return dtypes
    one = jnp.dtype(dtypes)
    return lambda path: one


def check_tensors(
    config: ModelConfig,
    checkpoint: Checkpoint,
    table: Mapping[str, Weight],
    shapes: Mapping[str, jax.ShapeDtypeStruct],
) -> None:
    """Refuses tensors that are missing, left over, of another shape, or not floats, by name."""
    wanted = {
        name: weight.tensor_shape(shapes[path].shape)
        for path, weight in table.items()
        for name in weight.names(shapes[path].shape)
    }
    inert = [re.compile(r) for r in registry.family(config.family).inert_tensors]
    if not config.lm_head or (config.tie_embeddings and head_is_tied(config, checkpoint)):
        names = [w.name for w in registry.family(config.family).table(config) if w.path == HEAD]
        inert += [re.compile(re.escape(name)) for name in names]
    found = checkpoint.files
    missing = [name for name in wanted if name not in found]
    if missing:
        raise RequestError(
            f"{len(missing)} of {len(wanted)} tensors are missing, the first is {missing[0]!r}",
            where=checkpoint.where,
        )
    extra = [n for n in found if n not in wanted and not any(r.fullmatch(n) for r in inert)]
    if extra:
        raise RequestError(
            f"{len(extra)} tensors have no place in a {config.family} model of this config, "
            f"the first is {checkpoint.stored_name(extra[0])!r}",
            where=checkpoint.where,
        )
    for name, shape in wanted.items():
        stored, where = checkpoint.stored_name(name), found[name].path
        if checkpoint.shape(name) != shape:
            raise RequestError(
                f"{stored!r} has shape {list(checkpoint.shape(name))}; config.json says "
                f"{list(shape)}",
                where=where,
            )
        dtype = checkpoint.dtype(name).name
        if dtype not in FLOATS:
            raise RequestError(
                f"{stored!r} is {dtype}; only {', '.join(FLOATS)} are read", where=where
            )


def reader(
    checkpoint: Checkpoint, weight: Weight, shape: tuple[int, ...], dtype: np.dtype
) -> Callable[[tuple[slice, ...]], np.ndarray]:
    """Returns what reads a part of one parameter.

    Of the layers (and experts) that the index names it reads the part that the index names,
    transposed and cast.
    """
    count = weight.stacked

    def part(index: tuple[slice, ...]) -> np.ndarray:
        bounds = tuple(s.indices(n)[:2] for s, n in zip(index, shape, strict=True))
        out = np.empty([stop - start for start, stop in bounds], dtype)
        within: list[Any] = [slice(*b) for b in bounds[count:]]
        if weight.part is not None:
            within[-1] = weight.part.places(*bounds[-1])
        if weight.transpose:
            within[-2:] = within[:-3:-1]
        for at in np.ndindex(*out.shape[:count]):
            number = (i + start for i, (start, _) in zip(at, bounds[:count], strict=True))
            checkpoint.read(weight.name.format(*number), tuple(within), weight.turned(out[at]))
        return out

    return part
