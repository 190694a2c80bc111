"""Gemma 2: Gemma2ForCausalLM of transformers; four norms a layer, soft caps, every second window.

Gemma 2 report, arXiv:2408.00118.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxtune.models.config import LayerKind, ModelConfig, pattern_of
from jaxtune.models.families import gemma, llama
from jaxtune.models.families.llama import INERT_TENSORS
from jaxtune.models.families.reader import Reader
from jaxtune.models.families.table import Weight
from jaxtune.models.families.windows import layer_windows, plain_window, windows_to_hf

__all__ = ["INERT_TENSORS", "from_hf", "table", "to_hf"]

MODEL_TYPE, ARCHITECTURE = "gemma2", "Gemma2ForCausalLM"
# transformers' values of absent fields, where they are not Llama's
DEFAULTS = {
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 8192,
    "query_pre_attn_scalar": 256,
    "tie_word_embeddings": True,
}

TABLE = (
    *(row for row in llama.TABLE if row.path != "blocks/mlp_norm/scale"),
    Weight("model.layers.{}.post_attention_layernorm.weight", "blocks/attn_post_norm/scale"),
    Weight("model.layers.{}.pre_feedforward_layernorm.weight", "blocks/mlp_norm/scale"),
    Weight("model.layers.{}.post_feedforward_layernorm.weight", "blocks/mlp_post_norm/scale"),
)


def table(config: ModelConfig) -> tuple[Weight, ...]:
    """Returns the weight-name rows; they are the same for every config."""
    return TABLE


def family_fields(read: Reader) -> dict[str, Any]:
    """Returns the ModelConfig fields that Gemma 2 and 3 spell alike, without the layers' kinds."""
    fields = gemma.family_fields(read, "hidden_activation")
    # beside hidden_activation, which transformers reads, published files carry this one
    if read.take("hidden_act") not in (None, read.raw["hidden_activation"]):
        raise read.refuse("hidden_act", "contradicts hidden_activation")
    return fields | {
        "norm_placement": "both",
        "attention_scale": read.integer("query_pre_attn_scalar") ** -0.5,
    }


def family_to_hf(config: ModelConfig, model_type: str, architecture: str) -> dict[str, Any]:
    """Returns the config.json fields that Gemma 2 and 3 spell alike."""
    fields = llama.common_to_hf(config, model_type, architecture) | windows_to_hf(config)
    fields["hidden_activation"] = fields.pop("hidden_act")
    del fields["use_sliding_window"]
    if fields["sliding_window"] is None:
        del fields["sliding_window"]  # transformers wants a number even where no layer slides
    scale = config.head_dim**-0.5 if config.attention_scale is None else config.attention_scale
    return fields | {
        "attention_bias": config.attention_bias,
        "query_pre_attn_scalar": round(scale**-2),
    }


def softcap(read: Reader, key: str, default: float | None) -> float | None:
    """Returns a soft cap; null is none, and `default` stands for an absent field."""
    if read.take(key) is None:
        return default if key not in read.raw else None
    return read.number(key)


def from_hf(raw: Mapping[str, Any], where: object | None = None) -> ModelConfig:
    """Returns the ModelConfig of a config.json; see `llama.from_hf`."""
    read = Reader({**DEFAULTS, **raw}, where)
    read.architecture(ARCHITECTURE)
    fields = family_fields(read)
    rope = read.rope(fields["max_position_embeddings"], fields["head_dim"])
    size = plain_window(read, 4096)
    # published files say it twice
    read.only("sliding_window_size", size)
    sliding = [layer % 2 == 0 for layer in range(fields["num_layers"])]
    windows = layer_windows(read, size, sliding)
    config = ModelConfig(
        family=MODEL_TYPE,
        attention_softcap=softcap(read, "attn_logit_softcapping", 50.0),
        final_softcap=softcap(read, "final_logit_softcapping", 30.0),
        **fields,
        **pattern_of([LayerKind(window, rope) for window in windows]),
    )
    read.finish(known=("cache_implementation",))
    return config


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """Returns the config.json of a ModelConfig."""
    return family_to_hf(config, MODEL_TYPE, ARCHITECTURE) | {
        "attn_logit_softcapping": config.attention_softcap,
        "final_logit_softcapping": config.final_softcap,
    }
