"""Qwen 2 and 2.5, dense: Qwen2ForCausalLM of transformers, a Llama with biases on q, k and v."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxtune.models.config import LayerKind, ModelConfig, pattern_of
from jaxtune.models.families import llama
from jaxtune.models.families.llama import INERT_TENSORS, table
from jaxtune.models.families.reader import Reader
from jaxtune.models.families.windows import layer_windows, switched_window, windows_to_hf

__all__ = ["INERT_TENSORS", "from_hf", "table", "to_hf"]

MODEL_TYPE, ARCHITECTURE = "qwen2", "Qwen2ForCausalLM"
# transformers' values of absent fields, where they are not Llama's
DEFAULTS = {"max_position_embeddings": 32768}


def windowed(read: Reader, fields: dict[str, Any]) -> dict[str, Any]:
    """Returns `fields` with the windows of Qwen's layers: full below max_window_layers."""
    # no positive integer: with 0 all layers slide
    first = read.take("max_window_layers", 28)
    if isinstance(first, bool) or not isinstance(first, int) or first < 0:
        raise read.refuse("max_window_layers", f"an integer from 0 is wanted, not {first!r}")
    sliding = [layer >= first for layer in range(fields["num_layers"])]
    sizes = layer_windows(read, switched_window(read, 4096), sliding)
    [kind] = fields["kinds"]
    return fields | pattern_of([LayerKind(size, kind.rope) for size in sizes])


def windowed_to_hf(config: ModelConfig) -> dict[str, Any]:
    """Returns the fields of the layers' windows."""
    fields = windows_to_hf(config)
    windows = [config.kinds[kind].window for kind in config.layer_kinds]
    first = next((i for i, window in enumerate(windows) if window is not None), len(windows))
    return fields | {"max_window_layers": first}


def from_hf(raw: Mapping[str, Any], where: object | None = None) -> ModelConfig:
    """Returns the ModelConfig of a config.json; see `llama.from_hf`."""
    read = Reader({**DEFAULTS, **raw}, where)
    read.architecture(ARCHITECTURE)
    fields = windowed(read, llama.common(read))
    config = ModelConfig(family=MODEL_TYPE, attention_bias=True, **fields)
    read.finish(known=("use_mrope",))
    return config


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """Returns the config.json of a ModelConfig."""
    return llama.common_to_hf(config, MODEL_TYPE, ARCHITECTURE) | windowed_to_hf(config)
