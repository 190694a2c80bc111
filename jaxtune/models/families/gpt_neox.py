"""GPT-NeoX and Pythia: GPTNeoXForCausalLM of transformers.

Layer norms, both sub-layers on one input, and a rotary embedding of part of each head
(arXiv:2204.06745).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxtune.models.config import LayerKind, ModelConfig
from jaxtune.models.families.reader import Reader, activation_to_hf
from jaxtune.models.families.rope_fields import rope_fields
from jaxtune.models.families.table import Part, Weight

MODEL_TYPE, ARCHITECTURE = "gpt_neox", "GPTNeoXForCausalLM"

# The causal mask and the frequencies, which old exports kept beside the weights.
INERT_TENSORS = (
    r"gpt_neox\.layers\.\d+\.attention\.(masked_)?bias",
    r"gpt_neox\.layers\.\d+\.attention\.rotary_emb\.inv_freq",
)
# Rates, by new and old names.
DROPOUT = (
    "hidden_dropout",
    "classifier_dropout",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
)
# What transformers 5 calls it in memory.
RENAMED = ((r"lm_head\.weight", "embed_out.weight"),)


def _pair(tensor: str, path: str, part: Part | None = None) -> tuple[Weight, Weight]:
    name = f"gpt_neox.layers.{{}}.{tensor}"
    return (
        Weight(f"{name}.weight", f"blocks/{path}/kernel", transpose=True, part=part),
        Weight(f"{name}.bias", f"blocks/{path}/bias", part=part),
    )


def _norm(tensor: str, path: str) -> tuple[Weight, Weight]:
    return (
        Weight(f"gpt_neox.{tensor}.weight", f"{path}/scale"),
        Weight(f"gpt_neox.{tensor}.bias", f"{path}/bias"),
    )


def table(config: ModelConfig) -> tuple[Weight, ...]:
    """Returns the weight-name rows; q, k and v alternate by head in one tensor."""
    width = config.head_dim
    fused = [Part(i * width, width, 3 * width) for i in range(3)]
    return (
        Weight("gpt_neox.embed_in.weight", "embed/embedding"),
        *_norm("layers.{}.input_layernorm", "blocks/attn_norm"),
        *_pair("attention.query_key_value", "attn/q_proj", fused[0]),
        *_pair("attention.query_key_value", "attn/k_proj", fused[1]),
        *_pair("attention.query_key_value", "attn/v_proj", fused[2]),
        *_pair("attention.dense", "attn/o_proj"),
        *_norm("layers.{}.post_attention_layernorm", "blocks/mlp_norm"),
        *_pair("mlp.dense_h_to_4h", "mlp/up_proj"),
        *_pair("mlp.dense_4h_to_h", "mlp/down_proj"),
        *_norm("final_layer_norm", "final_norm"),
        Weight("embed_out.weight", "lm_head/kernel", transpose=True),
    )


def module_table(config: ModelConfig) -> tuple[Weight, ...]:
    """Returns the rows by transformers 5's modules; its head is not named as in files."""
    return (*table(config)[:-1], Weight("lm_head.weight", "lm_head/kernel", transpose=True))


def from_hf(raw: Mapping[str, Any], where: object | None = None) -> ModelConfig:
    """Returns the ModelConfig of a config.json; see `llama.from_hf`."""
    read = Reader(raw, where)
    read.architecture(ARCHITECTURE)
    hidden, heads = read.integer("hidden_size"), read.integer("num_attention_heads")
    if hidden % heads:
        raise read.refuse("hidden_size", f"{hidden} is no multiple of {heads} attention heads")
    context = read.integer("max_position_embeddings", 2048)
    rope = read.rope(
        context, hidden // heads, fraction=0.25, names=("rotary_emb_base", "rotary_pct")
    )
    bias = read.flag("attention_bias", True)
    config = ModelConfig(
        family=MODEL_TYPE,
        vocab_size=read.integer("vocab_size"),
        hidden_size=hidden,
        intermediate_size=read.integer("intermediate_size"),
        num_layers=read.integer("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden // heads,
        max_position_embeddings=context,
        norm="layer",
        norm_eps=read.number("layer_norm_eps", 1e-5),
        parallel_residual=read.flag("use_parallel_residual", True),
        activation=read.activation(default="gelu"),
        gated=False,
        attention_bias=bias,
        attention_out_bias=bias,
        mlp_bias=True,
        kinds=(LayerKind(None, rope),),
        tie_embeddings=read.flag("tie_word_embeddings"),
        initializer_range=read.number("initializer_range", 0.02),
    )
    read.finish(known=DROPOUT)
    return config


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """Returns the config.json of a ModelConfig."""
    rope = config.kinds[0].rope
    return {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "max_position_embeddings": config.max_position_embeddings,
        "layer_norm_eps": config.norm_eps,
        "hidden_act": activation_to_hf(config.activation),
        "attention_bias": config.attention_bias,
        "use_parallel_residual": config.parallel_residual,
        "rotary_emb_base": rope.theta,
        "rotary_pct": rope.fraction,
        "rope_scaling": rope_fields(rope) or None,
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.initializer_range,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "use_cache": True,
    }
