"""IA3's scales, prompts and prefixes between PEFT's files and our leaves."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxtune.checkpoints.hf_export import gather
from jaxtune.checkpoints.peft_modules import PREFIX, linears
from jaxtune.checkpoints.peft_targets import targets_of
from jaxtune.core.errors import RequestError
from jaxtune.core.tree import flatten
from jaxtune.models.config import ModelConfig
from jaxtune.models.decoder import abstract_params
from jaxtune.peft.ia3 import Ia3, scales_input

PROMPT, IA3 = "prompt_embeddings", "ia3_l"


def ia3_shapes(
    fields: Mapping[str, Any], config: ModelConfig, where: Path
) -> dict[str, tuple[int, ...]]:
    """Returns {tensor name: shape} of IA3's file."""
    return {
        f"{PREFIX}{name}.{IA3}": (1, m.d_in) if scales_input(m.paths[0]) else (m.d_out, 1)
        for m, hits in targets_of(fields, config, where, linears(config)).items()
        for name, hit in zip(m.names, hits, strict=True)
        if hit
    }


def ia3_leaves(
    config: ModelConfig,
    method: Ia3,
    held: Mapping[str, Any],
    read: Callable[[str], np.ndarray],
) -> dict[str, np.ndarray]:
    """Returns {path: scales}; layers that the file leaves out have ones."""
    leaves = {}
    shapes = flatten(abstract_params(config, method))
    for module in linears(config):
        for number, path in enumerate(module.paths):
            if f"{path}/ia3/scale" not in shapes:
                continue
            leaf = np.ones(shapes[f"{path}/ia3/scale"].shape, np.float32)
            rows = leaf if module.layers is not None else leaf[None]
            for i, name in enumerate(module.names):
                if f"{PREFIX}{name}.{IA3}" in held:
                    scale = read(f"{PREFIX}{name}.{IA3}").reshape(-1)
                    rows[i] = scale if scales_input(path) else scale[module.places(number)]
            leaves[f"{path}/ia3/scale"] = leaf
    return leaves


def ia3_tensors(config: ModelConfig, flat: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Returns the tensors of IA3; the parts of a fused module that have no scale get ones."""
    tensors = {}
    for module in linears(config):
        held = {
            number: gather(flat[f"{path}/ia3/scale"]).astype(np.float32)
            for number, path in enumerate(module.paths)
            if f"{path}/ia3/scale" in flat
        }
        on_input = scales_input(module.paths[0])
        for i, name in enumerate(module.names if held else ()):
            whole = np.ones((module.d_in if on_input else module.d_out,), np.float32)
            for number, leaf in held.items():
                scale = leaf if module.layers is None else leaf[i]
                whole[slice(None) if on_input else module.places(number)] = scale
            tensors[f"{PREFIX}{name}.{IA3}"] = whole[None] if on_input else whole[:, None]
    return tensors


def prompt_scale(config: ModelConfig) -> float:
    """Returns by what our prompt is multiplied to be PEFT's.

    Gemma's embedding module scales what it looks up, so PEFT's prompt beside it is not scaled
    again; ours is, as every other family's is.
    """
    return config.embedding_scale if config.family.startswith("gemma") else 1.0


def check_windows(config: ModelConfig, where: Any = None) -> None:
    """Raises RequestError if a prefix means another thing in PEFT than here.

    A prefix is seen by every token here; in PEFT it slides out of a window as tokens do.
    """
    windows = [kind.window for kind in config.kinds if kind.window is not None]
    if min(windows, default=config.max_position_embeddings) < config.max_position_embeddings:
        raise RequestError(
            f"a prefix leaves the sliding window of {min(windows)} in PEFT, and not here; "
            "use format 'jaxtune'",
            key="format" if where is None else "peft_type",
            where=where,
        )


def prefix_width(config: ModelConfig) -> int:
    """Returns the width of PEFT's prefix, L * 2 * K*H.

    Layer, key or value, and channel run from slow to fast (peft.peft_model.get_prompt).
    """
    return config.num_layers * 2 * config.num_kv_heads * config.head_dim


def prefix_leaves(config: ModelConfig, table: np.ndarray) -> dict[str, np.ndarray]:
    """Returns keys and values [L, P, K*H] of a prefix [P, L * 2 * K*H]."""
    table = table.reshape(len(table), config.num_layers, 2, -1).transpose(2, 1, 0, 3)
    return {
        f"blocks/attn/prefix/{name}": np.ascontiguousarray(side)
        for name, side in zip(("key", "value"), table, strict=True)
    }


def prefix_table(flat: Mapping[str, Any]) -> np.ndarray:
    """Returns the prefix [P, L * 2 * K*H] of {path: leaf}."""
    sides = [gather(flat[f"blocks/attn/prefix/{name}"]) for name in ("key", "value")]
    table = np.stack(sides).astype(np.float32).transpose(2, 1, 0, 3)
    return table.reshape(len(table), -1)
