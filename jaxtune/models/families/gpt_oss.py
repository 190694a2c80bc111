"""gpt-oss: GptOssForCausalLM of transformers; sinks, alternating windows, clipped experts.

The released weights hold the experts as MXFP4 blocks, which `checkpoints.mxfp4` reads.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxtune.models.config import Experts, LayerKind, ModelConfig, pattern_of
from jaxtune.models.families import llama
from jaxtune.models.families.llama import INERT_TENSORS
from jaxtune.models.families.mixtral import TRAINING
from jaxtune.models.families.reader import Reader
from jaxtune.models.families.table import Part, Weight
from jaxtune.models.families.windows import layer_windows, plain_window, windows_to_hf
from jaxtune.models.layers import CLIP, CLIPPED, SHARPNESS

__all__ = ["INERT_TENSORS", "from_hf", "table", "to_hf"]

MODEL_TYPE, ARCHITECTURE = "gpt_oss", "GptOssForCausalLM"
# transformers' values of absent fields, where they are not Llama's
DEFAULTS = {
    "num_key_value_heads": 8,
    "rope_theta": 150000.0,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 131072,
}
# where config.json names no rotary embedding
ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}

# the gates are the even columns of gate_up_proj, the linear halves the odd ones
GATE, UP = Part(0, 1, 2), Part(1, 1, 2)
MOE, OURS = "model.layers.{}.mlp.", "blocks/mlp/experts"
TABLE = (
    *llama.TABLE,
    Weight("model.layers.{}.self_attn.sinks", "blocks/attn/sinks"),
    Weight(f"{MOE}router.weight", "blocks/mlp/router/kernel", transpose=True),
    Weight(f"{MOE}router.bias", "blocks/mlp/router/bias"),
    Weight(f"{MOE}experts.gate_up_proj", f"{OURS}/gate_proj/kernel", part=GATE),
    Weight(f"{MOE}experts.gate_up_proj", f"{OURS}/up_proj/kernel", part=UP),
    Weight(f"{MOE}experts.gate_up_proj_bias", f"{OURS}/gate_proj/bias", part=GATE),
    Weight(f"{MOE}experts.gate_up_proj_bias", f"{OURS}/up_proj/bias", part=UP),
    Weight(f"{MOE}experts.down_proj", f"{OURS}/down_proj/kernel"),
    Weight(f"{MOE}experts.down_proj_bias", f"{OURS}/down_proj/bias"),
)


def table(config: ModelConfig) -> tuple[Weight, ...]:
    """Returns the weight-name rows; they are the same for every config."""
    return TABLE


def _quantisation(read: Reader) -> None:
    found = read.take("quantization_config", {})
    if found and (not isinstance(found, Mapping) or found.get("quant_method") != "mxfp4"):
        raise read.refuse("quantization_config", "only quant_method 'mxfp4' is supported")


def from_hf(raw: Mapping[str, Any], where: object | None = None) -> ModelConfig:
    """Returns the ModelConfig of a config.json; see `llama.from_hf`."""
    named = raw.get("rope_scaling") or raw.get("rope_parameters")
    read = Reader({**DEFAULTS, **raw, **({} if named else {"rope_scaling": ROPE})}, where)
    read.architecture(ARCHITECTURE)
    _quantisation(read)
    read.only("hidden_act", "silu")
    read.only("swiglu_alpha", SHARPNESS)
    read.only("swiglu_limit", CLIP)
    fields, bias = llama.common(read, default_head_dim=64), read.flag("attention_bias", True)
    window, count = plain_window(read, 128), fields["num_layers"]
    sizes = layer_windows(read, window, [layer % 2 == 0 for layer in range(count)])
    [kind] = fields.pop("kinds")
    experts = Experts(
        count=read.integer("num_local_experts", 128),
        per_token=read.integer("num_experts_per_tok", 4),
        router_bias=True,
        bias=True,
    )
    config = ModelConfig(
        family=MODEL_TYPE,
        attention_bias=bias,
        attention_out_bias=bias,
        attention_sinks=True,
        experts=experts,
        **fields | {"activation": CLIPPED},
        **pattern_of([LayerKind(size, kind.rope) for size in sizes]),
    )
    # what the released config.json says twice
    read.finish(known=(*TRAINING, "experts_per_token", "initial_context_length"))
    return config


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """Returns the config.json of a ModelConfig."""
    windows = windows_to_hf(config)
    del windows["use_sliding_window"]
    plain = dataclasses.replace(config, activation="silu")
    return (
        llama.common_to_hf(plain, MODEL_TYPE, ARCHITECTURE)
        | windows
        | {
            "attention_bias": config.attention_bias,
            "num_local_experts": config.experts.count,
            "num_experts_per_tok": config.experts.per_token,
            "swiglu_alpha": SHARPNESS,
            "swiglu_limit": CLIP,
        }
    )
