"""Gemma: GemmaForCausalLM of transformers, and the parts that Gemma 2 and 3 share with it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from jaxtune.models.config import LayerKind, ModelConfig
from jaxtune.models.families import llama
from jaxtune.models.families.llama import INERT_TENSORS, table
from jaxtune.models.families.reader import Reader

__all__ = ["INERT_TENSORS", "from_hf", "table", "to_hf"]

MODEL_TYPE, ARCHITECTURE = "gemma", "GemmaForCausalLM"
# transformers' values of absent fields, where they are not Llama's
DEFAULTS = {
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}


def family_fields(read: Reader, activation: str) -> dict[str, Any]:
    """Returns the ModelConfig fields that all Gemmas spell alike, without the kinds of layers."""
    read.only("use_bidirectional_attention", False)
    bias = read.flag("attention_bias")
    fields = llama.sizes(read, activation=activation)
    return fields | {
        "attention_bias": bias,
        "attention_out_bias": bias,
        "norm_unit_offset": True,
        "embedding_scale": math.sqrt(fields["hidden_size"]),
    }


def from_hf(raw: Mapping[str, Any], where: object | None = None) -> ModelConfig:
    """Returns the ModelConfig of a config.json; see `llama.from_hf`."""
    read = Reader({**DEFAULTS, **raw}, where)
    read.architecture(ARCHITECTURE)
    # transformers 4 read this one, transformers 5 reads only hidden_act
    read.only("hidden_activation", "gelu_pytorch_tanh")
    fields = family_fields(read, "hidden_act")
    # the first checkpoints say "gelu" and mean its tanh approximation
    fields["activation"] = {"gelu": "gelu_tanh"}.get(fields["activation"], fields["activation"])
    rope = read.rope(fields["max_position_embeddings"], fields["head_dim"])
    config = ModelConfig(family=MODEL_TYPE, kinds=(LayerKind(None, rope),), **fields)
    read.finish()
    return config


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """Returns the config.json of a ModelConfig."""
    fields = llama.common_to_hf(config, MODEL_TYPE, ARCHITECTURE)
    # transformers 4 reads the second, transformers 5 the first
    both = {"hidden_act": fields["hidden_act"], "hidden_activation": fields["hidden_act"]}
    return fields | both | {"attention_bias": config.attention_bias}
