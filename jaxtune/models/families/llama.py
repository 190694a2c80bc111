"""Llama: LlamaForCausalLM of transformers, and the parts that its relatives share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxtune.models.config import LayerKind, ModelConfig
from jaxtune.models.families.reader import Reader, activation_to_hf
from jaxtune.models.families.rope_fields import rope_to_hf
from jaxtune.models.families.table import Weight

MODEL_TYPE, ARCHITECTURE = "llama", "LlamaForCausalLM"


def _linear(tensor: str, path: str) -> tuple[Weight, Weight]:
    return (
        Weight(f"model.layers.{{}}.{tensor}.weight", f"blocks/{path}/kernel", transpose=True),
        Weight(f"model.layers.{{}}.{tensor}.bias", f"blocks/{path}/bias"),
    )


TABLE = (
    Weight("model.embed_tokens.weight", "embed/embedding"),
    Weight("model.layers.{}.input_layernorm.weight", "blocks/attn_norm/scale"),
    *_linear("self_attn.q_proj", "attn/q_proj"),
    *_linear("self_attn.k_proj", "attn/k_proj"),
    *_linear("self_attn.v_proj", "attn/v_proj"),
    *_linear("self_attn.o_proj", "attn/o_proj"),
    Weight("model.layers.{}.post_attention_layernorm.weight", "blocks/mlp_norm/scale"),
    *_linear("mlp.gate_proj", "mlp/gate_proj"),
    *_linear("mlp.up_proj", "mlp/up_proj"),
    *_linear("mlp.down_proj", "mlp/down_proj"),
    Weight("model.norm.weight", "final_norm/scale"),
    Weight("lm_head.weight", "lm_head/kernel", transpose=True),
)


def table(config: ModelConfig) -> tuple[Weight, ...]:
    """Returns the weight-name rows; they are the same for every config."""
    return TABLE


# Buffers that old exports kept beside the weights; they follow from config.json.
INERT_TENSORS = (
    r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",
    r"model\.rotary_emb\.inv_freq",
)


def common(read: Reader, default_head_dim: int | None = None) -> dict[str, Any]:
    """Returns the ModelConfig fields that all relatives of Llama spell alike."""
    fields = sizes(read, default_head_dim)
    rope = read.rope(fields["max_position_embeddings"], fields["head_dim"])
    return fields | {"kinds": (LayerKind(None, rope),)}


def sizes(
    read: Reader, default_head_dim: int | None = None, activation: str = "hidden_act"
) -> dict[str, Any]:
    """Returns `common` without the kinds of layers; `activation` is the field that names it."""
    return read.heads(default_head_dim) | {
        "vocab_size": read.integer("vocab_size"),
        "intermediate_size": read.integer("intermediate_size"),
        "num_layers": read.integer("num_hidden_layers"),
        "max_position_embeddings": read.integer("max_position_embeddings", 2048),
        "norm_eps": read.number("rms_norm_eps", 1e-6),
        "activation": read.activation(activation),
        "tie_embeddings": read.flag("tie_word_embeddings"),
        "initializer_range": read.number("initializer_range", 0.02),
    }


def common_to_hf(config: ModelConfig, model_type: str, architecture: str) -> dict[str, Any]:
    """Returns the config.json fields that all relatives of Llama spell alike."""
    return {
        "architectures": [architecture],
        "model_type": model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.norm_eps,
        "hidden_act": activation_to_hf(config.activation),
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.initializer_range,
        "attention_dropout": 0.0,
        "use_cache": True,
    } | rope_to_hf(config.kinds[0].rope)


def from_hf(raw: Mapping[str, Any], where: object | None = None) -> ModelConfig:
    """Returns the ModelConfig of a config.json.

    Args:
        raw: the parsed file.
        where: the file, for messages.

    Raises:
        RequestError: a field that is wrong, unknown or not supported, by name.
    """
    read = Reader(raw, where)
    read.architecture(ARCHITECTURE)
    # transformers 4 split the matrix products by it, with the same result up to rounding
    read.integer("pretraining_tp", 1)
    bias = read.flag("attention_bias")
    config = ModelConfig(
        family=MODEL_TYPE,
        attention_bias=bias,
        attention_out_bias=bias,
        mlp_bias=read.flag("mlp_bias"),
        **common(read),
    )
    # notes of single checkpoints: LLaMA's first conversion and SmolLM2
    read.finish(known=("max_sequence_length", "is_llama_config"))
    return config


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """Returns the config.json of a ModelConfig."""
    return common_to_hf(config, MODEL_TYPE, ARCHITECTURE) | {
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
        "pretraining_tp": 1,
    }
