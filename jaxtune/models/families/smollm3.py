"""SmolLM3: SmolLM3ForCausalLM of transformers, a Llama without rotation on every fourth layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxtune.models.config import LayerKind, ModelConfig, pattern_of
from jaxtune.models.families import llama
from jaxtune.models.families.llama import INERT_TENSORS, table
from jaxtune.models.families.reader import Reader
from jaxtune.models.families.rope_fields import rope_to_hf
from jaxtune.models.families.windows import layer_windows, switched_window, windows_to_hf

__all__ = ["INERT_TENSORS", "from_hf", "table", "to_hf"]

MODEL_TYPE, ARCHITECTURE = "smollm3", "SmolLM3ForCausalLM"
# transformers' values of absent fields, where they are not Llama's
DEFAULTS = {"rope_theta": 2e6, "tie_word_embeddings": True, "num_key_value_heads": 4}


def _rotated(read: Reader, layers: int) -> list[bool]:
    """Returns whether each layer's queries and keys are rotated."""
    interval = read.integer("no_rope_layer_interval", 4)
    given = read.take("no_rope_layers")
    if given is None:
        return [bool((layer + 1) % interval) for layer in range(layers)]
    if not isinstance(given, list) or len(given) < layers or any(x not in (0, 1) for x in given):
        raise read.refuse("no_rope_layers", f"a list of {layers} ones (rotated) and zeros wanted")
    return [bool(x) for x in given[:layers]]


def from_hf(raw: Mapping[str, Any], where: object | None = None) -> ModelConfig:
    """Returns the ModelConfig of a config.json; see `llama.from_hf`."""
    read = Reader({**DEFAULTS, **raw}, where)
    read.architecture(ARCHITECTURE)
    fields, bias = llama.common(read), read.flag("attention_bias")
    [kind] = fields.pop("kinds")
    rotated = _rotated(read, fields["num_layers"])
    if not any(rotated):
        raise read.refuse("no_rope_layers", "at least one layer must be rotated")
    # layers that slide are those without rotation, unless `layer_types` says so
    sizes = layer_windows(read, switched_window(read), [not r for r in rotated])
    kinds = [LayerKind(w, kind.rope if r else None) for w, r in zip(sizes, rotated, strict=True)]
    config = ModelConfig(
        family=MODEL_TYPE,
        attention_bias=bias,
        attention_out_bias=bias,
        mlp_bias=read.flag("mlp_bias"),
        **fields,
        **pattern_of(kinds),
    )
    read.finish(known=("max_window_layers", "pretraining_tp"))
    return config


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """Returns the config.json of a ModelConfig."""
    rotated = [config.kinds[kind].rope for kind in config.layer_kinds]
    rope = next(rope for rope in rotated if rope is not None)
    return (
        llama.common_to_hf(config, MODEL_TYPE, ARCHITECTURE)
        | rope_to_hf(rope)
        | windows_to_hf(config)
        | {
            "attention_bias": config.attention_bias,
            "mlp_bias": config.mlp_bias,
            "no_rope_layers": [int(rope is not None) for rope in rotated],
        }
    )
