"""Mistral: MistralForCausalLM of transformers, a Llama with one window for all layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxtune.models.config import ModelConfig
from jaxtune.models.families import llama
from jaxtune.models.families.llama import INERT_TENSORS, table
from jaxtune.models.families.reader import Reader

__all__ = ["INERT_TENSORS", "from_hf", "table", "to_hf"]

MODEL_TYPE, ARCHITECTURE = "mistral", "MistralForCausalLM"


def from_hf(raw: Mapping[str, Any], where: object | None = None) -> ModelConfig:
    """Returns the ModelConfig of a config.json; see `llama.from_hf`."""
    read = Reader(raw, where)
    read.architecture(ARCHITECTURE)
    # transformers' default is 4096 for an absent field, while null is no window
    window = read.integer("sliding_window", 4096)
    if "sliding_window" in raw and raw["sliding_window"] is None:
        window = None
    fields = llama.common(read)
    [kind] = fields["kinds"]
    fields["kinds"] = (dataclasses.replace(kind, window=window),)
    config = ModelConfig(family=MODEL_TYPE, **fields)
    read.finish()
    return config


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """Returns the config.json of a ModelConfig."""
    fields = llama.common_to_hf(config, MODEL_TYPE, ARCHITECTURE)
    return fields | {"sliding_window": config.kinds[0].window}
