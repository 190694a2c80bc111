"""Granite 3, dense: GraniteForCausalLM of transformers, a Llama with four scalar multipliers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxtune.models.config import ModelConfig
from jaxtune.models.families import llama
from jaxtune.models.families.llama import INERT_TENSORS, table
from jaxtune.models.families.reader import Reader

__all__ = ["INERT_TENSORS", "from_hf", "table", "to_hf"]

MODEL_TYPE, ARCHITECTURE = "granite", "GraniteForCausalLM"


def from_hf(raw: Mapping[str, Any], where: object | None = None) -> ModelConfig:
    """Returns the ModelConfig of a config.json; see `llama.from_hf`."""
    read = Reader(raw, where)
    read.architecture(ARCHITECTURE)
    bias = read.flag("attention_bias")
    config = ModelConfig(
        family=MODEL_TYPE,
        attention_bias=bias,
        attention_out_bias=bias,
        mlp_bias=read.flag("mlp_bias"),
        embedding_scale=read.number("embedding_multiplier", 1),
        residual_scale=read.number("residual_multiplier", 1),
        attention_scale=read.number("attention_multiplier", 1),
        logits_scale=1 / read.number("logits_scaling", 1),
        **llama.common(read),
    )
    read.finish()
    return config


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """Returns the config.json of a ModelConfig."""
    scale = config.attention_scale
    return llama.common_to_hf(config, MODEL_TYPE, ARCHITECTURE) | {
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
        "embedding_multiplier": config.embedding_scale,
        "residual_multiplier": config.residual_scale,
        "attention_multiplier": config.head_dim**-0.5 if scale is None else scale,
        "logits_scaling": _reciprocal(config.logits_scale),
    }


def _reciprocal(scale: float) -> float:
    """The published divisor where there is one: 1 / (1 / 49) is not 49."""
    divisor = float(f"{1 / scale:.12g}")
    return divisor if 1 / divisor == scale else 1 / scale
