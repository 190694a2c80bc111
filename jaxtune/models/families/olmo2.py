"""OLMo 2: Olmo2ForCausalLM of transformers; norms behind the sub-layers, and on whole q and k."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxtune.models.config import ModelConfig
from jaxtune.models.families import llama
from jaxtune.models.families.llama import INERT_TENSORS
from jaxtune.models.families.reader import Reader
from jaxtune.models.families.table import Weight

__all__ = ["INERT_TENSORS", "from_hf", "table", "to_hf"]

MODEL_TYPE, ARCHITECTURE = "olmo2", "Olmo2ForCausalLM"
# transformers' values of absent fields, where they are not Llama's
DEFAULTS = {"rms_norm_eps": 1e-5}
NORMS = ("blocks/attn_norm/scale", "blocks/mlp_norm/scale")

TABLE = (
    *(row for row in llama.TABLE if row.path not in NORMS),
    Weight("model.layers.{}.self_attn.q_norm.weight", "blocks/attn/q_norm/scale"),
    Weight("model.layers.{}.self_attn.k_norm.weight", "blocks/attn/k_norm/scale"),
    Weight("model.layers.{}.post_attention_layernorm.weight", "blocks/attn_post_norm/scale"),
    Weight("model.layers.{}.post_feedforward_layernorm.weight", "blocks/mlp_post_norm/scale"),
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
        norm_placement="post",
        qk_norm="full",
        **llama.common(read),
    )
    read.finish()
    return config


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """Returns the config.json of a ModelConfig."""
    fields = llama.common_to_hf(config, MODEL_TYPE, ARCHITECTURE)
    return fields | {"attention_bias": config.attention_bias}
