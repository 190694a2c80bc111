"""Phi-3 and Phi-4-mini: Phi3ForCausalLM of transformers, a Llama with fused tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxtune.models.config import LayerKind, ModelConfig
from jaxtune.models.families import llama
from jaxtune.models.families.llama import INERT_TENSORS
from jaxtune.models.families.reader import Reader
from jaxtune.models.families.rope_fields import ORIGINAL, longrope_magnitude
from jaxtune.models.families.table import Part, Weight
from jaxtune.models.families.windows import plain_window

__all__ = ["INERT_TENSORS", "from_hf", "table", "to_hf"]

MODEL_TYPE, ARCHITECTURE = "phi3", "Phi3ForCausalLM"
# transformers' values of absent fields, where they are not Llama's
DEFAULTS = {"max_position_embeddings": 4096, ORIGINAL: 4096, "rms_norm_eps": 1e-5}
# What "longrope" was called when Phi-3 came out.
OLD_NAMES = ("su", "yarn")
FUSED = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")


def table(config: ModelConfig) -> tuple[Weight, ...]:
    """Returns the weight-name rows."""
    c = config
    queries, keys = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    whole, inner = queries + 2 * keys, c.intermediate_size
    parts = (
        ("self_attn.qkv_proj", "attn/q_proj", Part(0, queries, whole)),
        ("self_attn.qkv_proj", "attn/k_proj", Part(queries, keys, whole)),
        ("self_attn.qkv_proj", "attn/v_proj", Part(queries + keys, keys, whole)),
        ("mlp.gate_up_proj", "mlp/gate_proj", Part(0, inner, 2 * inner)),
        ("mlp.gate_up_proj", "mlp/up_proj", Part(inner, inner, 2 * inner)),
    )
    return (
        *(row for row in llama.TABLE if not any(f"/{name}/" in row.path for name in FUSED)),
        *(
            Weight(f"model.layers.{{}}.{tensor}.weight", f"blocks/{path}/kernel", True, part)
            for tensor, path, part in parts
        ),
    )


def _modern(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a config.json with today's name of its rope type."""
    changed = dict(raw)
    for key in ("rope_scaling", "rope_parameters"):
        if isinstance(raw.get(key), Mapping):
            changed[key] = {
                name: "longrope" if name in ("type", "rope_type") and value in OLD_NAMES else value
                for name, value in raw[key].items()
            }
    return changed


def from_hf(raw: Mapping[str, Any], where: object | None = None) -> ModelConfig:
    """Returns the ModelConfig of a config.json; see `llama.from_hf`."""
    read = Reader({**DEFAULTS, **_modern(raw)}, where)
    read.architecture(ARCHITECTURE)
    fields = llama.sizes(read)
    rope = read.rope(
        fields["max_position_embeddings"],
        fields["head_dim"],
        fraction=1.0,
        original=read.integer(ORIGINAL),
        types=("default", "longrope"),
    )
    config = ModelConfig(family=MODEL_TYPE, kinds=(LayerKind(plain_window(read), rope),), **fields)
    # of Microsoft's own code, which transformers does without
    read.only("full_attn_mod", 1)
    read.only("interpolate_factor", 1)
    read.finish(known=("embd_pdrop", "auto_map"))
    return config


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """Returns the config.json of a ModelConfig."""
    kind = config.kinds[0]
    rope = kind.rope
    fields = llama.common_to_hf(config, MODEL_TYPE, ARCHITECTURE) | {
        "sliding_window": kind.window,
        "partial_rotary_factor": rope.fraction,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
    }
    if rope.scaling == "default":
        return fields
    factors = {
        "type": "longrope",
        "short_factor": list(rope.short_factors),
        "long_factor": list(rope.long_factors),
    }
    # transformers 4 refuses any fourth field, so one that follows from the others is left out
    stretch = config.max_position_embeddings / rope.original_context
    if rope.magnitude != longrope_magnitude(stretch, rope.original_context):
        factors["attention_factor"] = rope.magnitude
    return fields | {ORIGINAL: rope.original_context, "rope_scaling": factors}
