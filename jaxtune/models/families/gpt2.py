"""GPT-2: GPT2LMHeadModel of transformers; learned positions, layer norms, fused q, k and v."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxtune.models.config import LayerKind, ModelConfig
from jaxtune.models.families.reader import Reader, activation_to_hf
from jaxtune.models.families.table import Part, Weight

MODEL_TYPE, ARCHITECTURE = "gpt2", "GPT2LMHeadModel"

# The causal mask, which old exports kept beside the weights.
INERT_TENSORS = (r"transformer\.h\.\d+\.attn\.(masked_)?bias",)
# The published checkpoints hold the bare GPT2Model.
RENAMED = ((r"(wte|wpe|h\.\d+|ln_f)\.(.*)", r"transformer.\1.\2"),)


def _pair(tensor: str, path: str, leaf: str = "kernel", part: Part | None = None):
    """The rows of a weight and its bias; GPT-2 stores kernels as [in, out]."""
    return (
        Weight(f"transformer.{tensor}.weight", f"{path}/{leaf}", part=part),
        Weight(f"transformer.{tensor}.bias", f"{path}/bias", part=part),
    )


def table(config: ModelConfig) -> tuple[Weight, ...]:
    """Returns the weight-name rows."""
    width = config.hidden_size
    fused = [Part(i * width, width, 3 * width) for i in range(3)]
    return (
        Weight("transformer.wte.weight", "embed/embedding"),
        Weight("transformer.wpe.weight", "embed/positions"),
        *_pair("h.{}.ln_1", "blocks/attn_norm", "scale"),
        *_pair("h.{}.attn.c_attn", "blocks/attn/q_proj", part=fused[0]),
        *_pair("h.{}.attn.c_attn", "blocks/attn/k_proj", part=fused[1]),
        *_pair("h.{}.attn.c_attn", "blocks/attn/v_proj", part=fused[2]),
        *_pair("h.{}.attn.c_proj", "blocks/attn/o_proj"),
        *_pair("h.{}.ln_2", "blocks/mlp_norm", "scale"),
        *_pair("h.{}.mlp.c_fc", "blocks/mlp/up_proj"),
        *_pair("h.{}.mlp.c_proj", "blocks/mlp/down_proj"),
        *_pair("ln_f", "final_norm", "scale"),
        Weight("lm_head.weight", "lm_head/kernel", transpose=True),
    )


# Dropout rates, what only the classification heads read, and what no version of the model reads.
KNOWN = (
    "embd_pdrop",
    "attn_pdrop",
    "summary_type",
    "summary_use_proj",
    "summary_activation",
    "summary_proj_to_labels",
    "summary_first_dropout",
    "reorder_and_upcast_attn",  # float32 scores, which ours always are
    "n_ctx",
    "output_past",
    "predict_special_tokens",
)


def from_hf(raw: Mapping[str, Any], where: object | None = None) -> ModelConfig:
    """Returns the ModelConfig of a config.json; see `llama.from_hf`."""
    read = Reader(raw, where)
    read.architecture(ARCHITECTURE)
    hidden, heads = read.integer("n_embd"), read.integer("n_head")
    if hidden % heads:
        raise read.refuse("n_embd", f"{hidden} is no multiple of {heads} heads")
    read.only("scale_attn_by_inverse_layer_idx", False)
    read.only("add_cross_attention", False)
    config = ModelConfig(
        family=MODEL_TYPE,
        vocab_size=read.integer("vocab_size"),
        hidden_size=hidden,
        intermediate_size=read.integer("n_inner", 4 * hidden),
        num_layers=read.integer("n_layer"),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden // heads,
        max_position_embeddings=read.integer("n_positions", 1024),
        norm="layer",
        norm_eps=read.number("layer_norm_epsilon", 1e-5),
        activation=read.activation("activation_function", "gelu_new"),
        gated=False,
        attention_bias=True,
        attention_out_bias=True,
        mlp_bias=True,
        learned_positions=True,
        kinds=(LayerKind(rope=None),),
        attention_scale=None if read.flag("scale_attn_weights", True) else 1.0,
        tie_embeddings=read.flag("tie_word_embeddings", True),
        initializer_range=read.number("initializer_range", 0.02),
    )
    read.only("n_special", 0)  # rows of further tokens, which vocab_size does not count
    read.finish(known=KNOWN)
    return config


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """Returns the config.json of a ModelConfig."""
    activation = activation_to_hf(config.activation)
    return {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        "vocab_size": config.vocab_size,
        "n_embd": config.hidden_size,
        "n_inner": config.intermediate_size,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "n_positions": config.max_position_embeddings,
        "layer_norm_epsilon": config.norm_eps,
        "activation_function": "gelu_new" if config.activation == "gelu_tanh" else activation,
        "scale_attn_weights": config.attention_scale != 1.0,
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.initializer_range,
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "use_cache": True,
    }
