"""Qwen 3, dense: Qwen3ForCausalLM of transformers, a Llama with normed queries and keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxtune.models.config import ModelConfig
from jaxtune.models.families import llama
from jaxtune.models.families.llama import INERT_TENSORS
from jaxtune.models.families.qwen2 import DEFAULTS, windowed, windowed_to_hf
from jaxtune.models.families.reader import Reader
from jaxtune.models.families.table import Weight

__all__ = ["INERT_TENSORS", "from_hf", "table", "to_hf"]

MODEL_TYPE, ARCHITECTURE = "qwen3", "Qwen3ForCausalLM"

TABLE = (
    *llama.TABLE,
    Weight("model.layers.{}.self_attn.q_norm.weight", "blocks/attn/q_norm/scale"),
    Weight("model.layers.{}.self_attn.k_norm.weight", "blocks/attn/k_norm/scale"),
)


def table(config: ModelConfig) -> tuple[Weight, ...]:
    """Returns the weight-name rows; they are the same for every config."""
    return TABLE


def from_hf(raw: Mapping[str, Any], where: object | None = None) -> ModelConfig:
    """Returns the ModelConfig of a config.json; see `llama.from_hf`."""
    read = Reader({**DEFAULTS, **raw}, where)
    read.architecture(ARCHITECTURE)
    bias = read.flag("attention_bias")
    config = ModelConfig(
        family=MODEL_TYPE,
        attention_bias=bias,
        attention_out_bias=bias,
        qk_norm="head",
        **windowed(read, llama.common(read, default_head_dim=128)),
    )
    read.finish()
    return config


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """Returns the config.json of a ModelConfig."""
    fields = llama.common_to_hf(config, MODEL_TYPE, ARCHITECTURE) | windowed_to_hf(config)
    return fields | {"attention_bias": config.attention_bias}
