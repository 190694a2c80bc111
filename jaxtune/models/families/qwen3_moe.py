"""Qwen 3 with routed experts in every layer: Qwen3MoeForCausalLM of transformers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxtune.models.config import Experts, ModelConfig
from jaxtune.models.families import llama, qwen3
from jaxtune.models.families.llama import INERT_TENSORS
from jaxtune.models.families.mixtral import TRAINING, stacked_experts
from jaxtune.models.families.reader import Reader
from jaxtune.models.families.table import Weight
from jaxtune.models.families.windows import switched_window

__all__ = ["INERT_TENSORS", "from_hf", "module_table", "table", "to_hf"]

MODEL_TYPE, ARCHITECTURE = "qwen3_moe", "Qwen3MoeForCausalLM"
# transformers' values of absent fields, where they are not Llama's
DEFAULTS = {
    "num_key_value_heads": 4,
    "intermediate_size": 6144,
    "max_position_embeddings": 32768,
}

MOE = "model.layers.{}.mlp."
ROUTED = (
    *qwen3.TABLE,
    Weight(f"{MOE}gate.weight", "blocks/mlp/router/kernel", transpose=True),
)
TABLE = (
    *ROUTED,
    *(
        Weight(
            f"{MOE}experts.{{}}.{name}.weight", f"blocks/mlp/experts/{name}/kernel", transpose=True
        )
        for name in ("gate_proj", "up_proj", "down_proj")
    ),
)


def table(config: ModelConfig) -> tuple[Weight, ...]:
    """Returns the weight-name rows; they are the same for every config."""
    return TABLE


def module_table(config: ModelConfig) -> tuple[Weight, ...]:
    """Returns the rows by transformers 5's modules, which are not named as its files."""
    return (*ROUTED, *stacked_experts(config))


def _experts(read: Reader) -> Experts:
    # transformers 5 writes num_local_experts for what was num_experts
    names = ("num_experts", "num_local_experts")
    counts = {read.integer(name) for name in names if read.raw.get(name) is not None}
    if len(counts) > 1:
        raise read.refuse(names[1], f"contradicts {names[0]}")
    # dense layers among the sparse ones
    read.only("decoder_sparse_step", 1)
    read.only("mlp_only_layers", [])
    read.only("shared_expert_intermediate_size", 0)
    read.only("use_qk_norm", True)
    return Experts(
        count=counts.pop() if counts else 128,
        per_token=read.integer("num_experts_per_tok", 8),
        normalise=read.flag("norm_topk_prob"),
    )


def from_hf(raw: Mapping[str, Any], where: object | None = None) -> ModelConfig:
    """Returns the ModelConfig of a config.json; see `llama.from_hf`."""
    read = Reader({**DEFAULTS, **raw}, where)
    read.architecture(ARCHITECTURE)
    fields, bias = llama.common(read), read.flag("attention_bias")
    [kind] = fields["kinds"]
    # all layers have the window; max_window_layers is read by none
    fields["kinds"] = (dataclasses.replace(kind, window=switched_window(read, 4096)),)
    # intermediate_size is that of dense layers, of which there are none
    fields["intermediate_size"] = read.integer("moe_intermediate_size", 768)
    config = ModelConfig(
        family=MODEL_TYPE,
        attention_bias=bias,
        attention_out_bias=bias,
        qk_norm="head",
        experts=_experts(read),
        **fields,
    )
    read.finish(known=(*TRAINING, "max_window_layers"))
    return config


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """Returns the config.json of a ModelConfig."""
    window = config.kinds[0].window
    return llama.common_to_hf(config, MODEL_TYPE, ARCHITECTURE) | {
        "attention_bias": config.attention_bias,
        "use_sliding_window": window is not None,
        "sliding_window": window,
        "moe_intermediate_size": config.intermediate_size,
        "num_experts": config.experts.count,
        "num_experts_per_tok": config.experts.per_token,
        "norm_topk_prob": config.experts.normalise,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }
