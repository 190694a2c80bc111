"""Hugging Face model directories out: safetensors shards, config.json, tokenizer."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.checkpoints.hf_directory import replaced
from jaxtune.checkpoints.hf_tensors import INDEX, WEIGHTS
from jaxtune.checkpoints.safetensors import TensorWriter
from jaxtune.core.errors import RequestError
from jaxtune.core.tree import Tree, flatten, unflatten
from jaxtune.data.tokenizer import Tokenizer
from jaxtune.models.config import ModelConfig
from jaxtune.models.decoder import abstract_params
from jaxtune.models.families import registry
from jaxtune.models.families.table import Weight, rows
from jaxtune.peft.method import Method

TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def config_of(config: ModelConfig, params: Tree) -> ModelConfig:
    """Returns the ModelConfig that describes merged parameters, with the biases that they have.

    BitFit merges into biases that the base's config lacks. Where the base's family cannot hold
    them, an equal Llama can. No kernel is quantised any more, and a value head beside the head of
    a language model, which only its training used, is left out.

    Args:
        config: of the base.
        params: nested dict of the base's parameters, merged.

    Raises:
        RequestError: no family can hold the model.
    """
    biases = [path for path in flatten(params) if path.endswith("_proj/bias")]
    biased = {path.split("/")[-2] for path in biases if "/experts/" not in path}
    qkv = bool(biased & {"q_proj", "k_proj", "v_proj"}) or config.attention_bias
    out = "o_proj" in biased or config.attention_out_bias
    mlp = bool(biased & {"gate_proj", "up_proj", "down_proj"}) or config.mlp_bias
    scorer = config.score_head and not config.lm_head
    config = dataclasses.replace(config.unquantized, score_head=scorer)
    exact = dataclasses.replace(config, attention_bias=qkv, attention_out_bias=out, mlp_bias=mlp)
    # a family with one switch for q, k, v and o is given zeros where a bias is missing
    wide = dataclasses.replace(exact, attention_bias=qkv or out, attention_out_bias=qkv or out)
    for family in dict.fromkeys((config.family, "llama")):
        for candidate in (exact, wide):
            candidate = dataclasses.replace(candidate, family=family)
            if not registry.not_held(candidate):
                return candidate
    on = f" with biases on {', '.join(sorted(biased))}" if biased else ""
    raise RequestError(
        f"no Hugging Face family holds a {config.family} model{on}: "
        + ", ".join(registry.not_held(exact))
    )


def with_biases(config: ModelConfig, params: Tree) -> Tree:
    """Returns merged parameters with zeros for the biases that only `config_of` asks for."""
    flat = flatten(params)
    shapes = flatten(abstract_params(config, Method()))
    zeros = {
        path: jnp.zeros(leaf.shape, flat[f"{path.rpartition('/')[0]}/kernel"].dtype)
        for path, leaf in shapes.items()
        if path not in flat and path.endswith("_proj/bias")
    }
    return unflatten({path: (flat | zeros)[path] for path in shapes})


def save_hf(
    directory: str | os.PathLike[str],
    config: ModelConfig,
    params: Tree,
    *,
    dtype: Any,
    tokenizer: Tokenizer | None = None,
    raw: Mapping[str, Any] | None = None,
    max_shard_bytes: float = 5e9,
) -> ModelConfig:
    """Writes a model that transformers and jaxtune load; an older export is replaced at the end.

    Tensors are gathered one layer at a time. With several hosts all must call it, and the first
    writes.

    Args:
        directory: new, or holding an export.
        config: of the base.
        params: nested dict of the base's parameters, any float dtype; merged, if there was an
            adapter. Biases that the base lacks are written as `config_of` says.
        dtype: of the written tensors.
        tokenizer: written beside the weights; its ids win over those of `raw`.
        raw: the base's config.json, for its token ids.
        max_shard_bytes: upper limit of a file; a single larger tensor has one of its own.

    Returns:
        The ModelConfig of what was written.

    Raises:
        RequestError: no family can hold the model, or the directory is not ours to replace.
    """
    config = config_of(config, params)
    dtype = np.dtype(dtype)
    shapes = {path: leaf.shape for path, leaf in flatten(abstract_params(config, Method())).items()}
    flat = flatten(params)
    check_leaves(flat, shapes)
    table = rows(registry.family(config.family).table(config), shapes)
    if jax.process_index() != 0:
        for _ in tensors_of(table, shapes, flat):  # takes part in gathering
            pass
        return config
    with replaced(directory) as aside, contextlib.ExitStack() as stack:
        writers = open_shards(aside, table, shapes, dtype, max_shard_bytes, stack)
        for name, tensor in tensors_of(table, shapes, flat):
            writers[name].write(name, tensor)
        stack.close()  # flushed to disk before the directory takes its place
        write_configs(aside, config, dtype, tokenizer, raw or {})
    return config


def tensors_of(
    table: Mapping[str, Weight], shapes: Mapping[str, tuple[int, ...]], flat: Mapping[str, Any]
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (tensor name, array on this host), a layer at a time; absent biases as zeros."""
    by_name: dict[str, list[str]] = {}
    for path, weight in table.items():
        by_name.setdefault(weight.name, []).append(path)
    for paths in by_name.values():
        weight, shape = table[paths[0]], shapes[paths[0]]
        for name, at in zip(weight.names(shape), weight.indices(shape), strict=True):
            if len(paths) == 1 and weight.part is None and paths[0] in flat:
                yield name, weight.turned(gather(flat[paths[0]], at))
                continue
            dtype = next((flat[path].dtype for path in paths if path in flat), np.float32)
            whole = np.zeros(weight.tensor_shape(shape), dtype)
            for path in paths:
                if path in flat:
                    one = gather(flat[path], at)
                    places = table[path].part.places(0, one.shape[-1])
                    # a view with the outputs last, as the parameter has them
                    table[path].turned(whole)[..., places] = one
            yield name, whole


def check_leaves(flat: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuses parameters that are no base's, missing, or misshapen; biases may be missing."""
    extra = [path for path in flat if path not in shapes]
    if extra:
        raise RequestError(f"parameter {extra[0]!r} is no part of a base model; merge it first")
    for path, shape in shapes.items():
        if path not in flat and not path.endswith("_proj/bias"):
            raise RequestError(f"parameter {path!r} is missing")
        if path in flat and tuple(flat[path].shape) != tuple(shape):
            raise RequestError(
                f"parameter {path!r} has shape {tuple(flat[path].shape)}; its model's is {shape}"
            )


def gather(leaf: Any, at: tuple[int, ...] = ()) -> np.ndarray:
    """Returns a parameter, or one layer (and expert) of it, whole and on this host."""
    part = leaf[at] if at else leaf
    if isinstance(part, jax.Array) and not part.is_fully_addressable:
        from jax.experimental import multihost_utils

        return np.asarray(multihost_utils.process_allgather(part, tiled=True))
    return np.asarray(part)


def open_shards(
    directory: Path,
    table: Mapping[str, Weight],
    shapes: Mapping[str, tuple[int, ...]],
    dtype: np.dtype,
    max_bytes: float,
    stack: contextlib.ExitStack,
) -> dict[str, TensorWriter]:
    """Opens the files, writes the index if they are several; returns {tensor name: its file}."""
    order = {}  # layer by layer, so that one layer's tensors lie together
    for place, (path, weight) in enumerate(table.items()):
        shape = shapes[path]
        for name, at in zip(weight.names(shape), weight.indices(shape), strict=True):
            key = (1, at, place) if at else (0 if path.startswith("embed") else 2, at, place)
            order[name] = (key, (dtype, weight.tensor_shape(shapes[path])))
    groups: list[dict[str, tuple]] = [{}]
    filled = 0
    for name, (_, entry) in sorted(order.items(), key=lambda item: item[1][0]):
        size = int(np.prod(entry[1])) * dtype.itemsize
        if groups[-1] and filled + size > max_bytes:
            groups.append({})
            filled = 0
        groups[-1][name] = entry
        filled += size
    writers, weight_map = {}, {}
    for number, group in enumerate(groups, 1):
        file = WEIGHTS
        if len(groups) > 1:
            file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        writer = stack.enter_context(TensorWriter(directory / file, group))
        writers |= dict.fromkeys(group, writer)
        weight_map |= dict.fromkeys(group, file)
    if len(groups) > 1:
        total = sum(int(np.prod(entry[1])) * dtype.itemsize for _, entry in order.values())
        write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    return writers


def write_configs(
    directory: Path,
    config: ModelConfig,
    dtype: np.dtype,
    tokenizer: Tokenizer | None,
    raw: Mapping[str, Any],
) -> None:
    """Writes config.json, the tokenizer's files and a language model's generation_config.json."""
    ids = {name: raw[name] for name in TOKEN_IDS if raw.get(name) is not None}
    stop = ids.get("eos_token_id")
    if not config.lm_head:
        pad = scorer_padding(tokenizer, ids)
        ids.pop("pad_token_id", None)
        ids |= {} if pad is None else {"pad_token_id": pad}
        if tokenizer is not None and pad is not None:
            tokenizer = tokenizer.with_padding(pad)
    if tokenizer is not None:
        own = {
            "bos_token_id": tokenizer.bos_id,
            "eos_token_id": tokenizer.eos_id,
        } | ({"pad_token_id": tokenizer.hf.pad_token_id} if config.lm_head else {})
        ids |= {name: value for name, value in own.items() if value is not None}
        stop = list(tokenizer.eos_ids) or stop
        tokenizer.save(directory)
    if isinstance(stop, list) and len(stop) == 1:
        stop = stop[0]
    # transformers takes absent ids for its own defaults, 1 and 2, which may be ordinary tokens
    fields = registry.to_hf(config) | dict.fromkeys(TOKEN_IDS) | ids
    write_json(directory / "config.json", fields | {"torch_dtype": dtype.name})
    if not config.lm_head:
        return
    generation = (
        {"_from_model_config": True} | ids | ({} if stop is None else {"eos_token_id": stop})
    )
    write_json(directory / "generation_config.json", generation)


def scorer_padding(tokenizer: Tokenizer | None, ids: Mapping[str, Any]) -> int | None:
    """Returns the id with which texts for a reward model are padded in transformers.

    Its class reads the score in front of the padding, so that no text may end with that id. Without
    one, None, it takes one text at a time.

    Args:
        tokenizer: or None, where only ids are used.
        ids: the token ids of the base's config.json.
    """
    if tokenizer is not None:
        return tokenizer.pad_apart
    stop = ids.get("eos_token_id")
    pad = ids.get("pad_token_id")
    return None if pad in (stop if isinstance(stop, list) else [stop]) else pad


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes an object as indented JSON with a final newline."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
