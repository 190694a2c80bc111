"""Mixtral: MixtralForCausalLM of transformers, a Mistral with routed experts in every layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxtune.models.config import Experts, ModelConfig
from jaxtune.models.families import llama
from jaxtune.models.families.llama import INERT_TENSORS
from jaxtune.models.families.reader import Reader
from jaxtune.models.families.table import Part, Weight
from jaxtune.models.families.windows import plain_window

__all__ = ["INERT_TENSORS", "from_hf", "module_table", "table", "to_hf"]

MODEL_TYPE, ARCHITECTURE = "mixtral", "MixtralForCausalLM"
# transformers' values of absent fields, where they are not Llama's
DEFAULTS = {
    "num_key_value_heads": 8,
    "rope_theta": 1e6,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 131072,
}
# Of the load-balancing loss while training, which a run's own config decides.
TRAINING = ("output_router_logits", "router_aux_loss_coef")

MOE = "model.layers.{}.block_sparse_moe."
TABLE = (
    *llama.TABLE,
    Weight(f"{MOE}gate.weight", "blocks/mlp/router/kernel", transpose=True),
    Weight(f"{MOE}experts.{{}}.w1.weight", "blocks/mlp/experts/gate_proj/kernel", transpose=True),
    Weight(f"{MOE}experts.{{}}.w3.weight", "blocks/mlp/experts/up_proj/kernel", transpose=True),
    Weight(f"{MOE}experts.{{}}.w2.weight", "blocks/mlp/experts/down_proj/kernel", transpose=True),
)


def table(config: ModelConfig) -> tuple[Weight, ...]:
    """Returns the weight-name rows; they are the same for every config."""
    return TABLE


def module_table(config: ModelConfig) -> tuple[Weight, ...]:
    """Returns the rows by transformers 5's modules, which are not named as its files."""
    router = Weight("model.layers.{}.mlp.gate.weight", "blocks/mlp/router/kernel", transpose=True)
    return (*llama.TABLE, router, *stacked_experts(config))


def stacked_experts(config: ModelConfig) -> tuple[Weight, ...]:
    """Returns the rows of a layer's experts as transformers 5 holds them, in two tensors.

    gate_up_proj is [E, 2F, D], the gates before the linear halves; down_proj is [E, D, F].
    """
    name, path = "model.layers.{}.mlp.experts.", "blocks/mlp/experts"
    width = config.intermediate_size
    gate, up = (Part(start, width, 2 * width) for start in (0, width))
    return (
        Weight(f"{name}gate_up_proj", f"{path}/gate_proj/kernel", transpose=True, part=gate),
        Weight(f"{name}gate_up_proj", f"{path}/up_proj/kernel", transpose=True, part=up),
        Weight(f"{name}down_proj", f"{path}/down_proj/kernel", transpose=True),
    )


def from_hf(raw: Mapping[str, Any], where: object | None = None) -> ModelConfig:
    """Returns the ModelConfig of a config.json; see `llama.from_hf`."""
    read = Reader({**DEFAULTS, **raw}, where)
    read.architecture(ARCHITECTURE)
    read.only("router_jitter_noise", 0)
    fields = llama.common(read)
    [kind] = fields["kinds"]
    fields["kinds"] = (dataclasses.replace(kind, window=plain_window(read)),)
    experts = Experts(
        count=read.integer("num_local_experts", 8),
        per_token=read.integer("num_experts_per_tok", 2),
    )
    config = ModelConfig(family=MODEL_TYPE, experts=experts, **fields)
    read.finish(known=TRAINING)
    return config


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """Returns the config.json of a ModelConfig."""
    return llama.common_to_hf(config, MODEL_TYPE, ARCHITECTURE) | {
        "sliding_window": config.kinds[0].window,
        "num_local_experts": config.experts.count,
        "num_experts_per_tok": config.experts.per_token,
    }
