"""Gemma 3, text: Gemma3ForCausalLM of transformers; a Gemma 2 with normed queries and keys.

Layers that slide have a rotary embedding of their own. Gemma 3 report, arXiv:2503.19786.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxtune.models.config import LayerKind, ModelConfig, pattern_of
from jaxtune.models.families import gemma2
from jaxtune.models.families.llama import INERT_TENSORS
from jaxtune.models.families.reader import Reader
from jaxtune.models.families.rope_fields import read_rope, rope_fields, rope_to_hf
from jaxtune.models.families.table import Weight
from jaxtune.models.families.windows import FULL, SLIDING, layer_windows, plain_window
from jaxtune.models.rope import Rope

__all__ = ["INERT_TENSORS", "from_hf", "table", "to_hf"]

MODEL_TYPE, ARCHITECTURE = "gemma3_text", "Gemma3ForCausalLM"
# transformers' values of absent fields, where they are not Gemma 2's
DEFAULTS = gemma2.DEFAULTS | {"max_position_embeddings": 131072}
GLOBAL_THETA, LOCAL_THETA = 1_000_000.0, 10_000.0

TABLE = (
    *gemma2.TABLE,
    Weight("model.layers.{}.self_attn.q_norm.weight", "blocks/attn/q_norm/scale"),
    Weight("model.layers.{}.self_attn.k_norm.weight", "blocks/attn/k_norm/scale"),
)


def table(config: ModelConfig) -> tuple[Weight, ...]:
    """Returns the weight-name rows; they are the same for every config."""
    return TABLE


def _ropes(read: Reader, context: int, width: int) -> dict[str, Rope]:
    """Returns the rotary embedding of each type of layer."""
    full, slide = read.number("rope_theta", GLOBAL_THETA), LOCAL_THETA
    slide = read.number("rope_local_base_freq", slide)
    old, new = read.take("rope_scaling", {}), read.take("rope_parameters", {})
    if old and new:
        raise read.refuse("rope_scaling", "stands beside rope_parameters, which would win in part")
    if not isinstance(new, Mapping) or any(key not in (FULL, SLIDING) for key in new):
        raise read.refuse("rope_parameters", f"an object of {FULL!r} and {SLIDING!r} is wanted")
    found = {}
    for kind, theta in ((FULL, full), (SLIDING, slide)):
        key, fields = f"rope_parameters.{kind}", new.get(kind) or {}
        if kind == FULL and old:
            key, fields = "rope_scaling", old
        found[kind] = read_rope(read, key, fields, context=context, theta=theta, width=width)
    return found


def from_hf(raw: Mapping[str, Any], where: object | None = None) -> ModelConfig:
    """Returns the ModelConfig of a config.json; see `llama.from_hf`."""
    read = Reader({**DEFAULTS, **raw}, where)
    read.architecture(ARCHITECTURE)
    fields = gemma2.family_fields(read)
    ropes = _ropes(read, fields["max_position_embeddings"], fields["head_dim"])
    # transformers holds it, and caps nothing
    read.only("attn_logit_softcapping")
    every = read.integer("sliding_window_pattern", 6)
    sliding = [bool((layer + 1) % every) for layer in range(fields["num_layers"])]
    windows = layer_windows(read, plain_window(read, 4096), sliding)
    kinds = [LayerKind(w, ropes[FULL if w is None else SLIDING]) for w in windows]
    config = ModelConfig(
        family=MODEL_TYPE,
        qk_norm="head",
        final_softcap=gemma2.softcap(read, "final_logit_softcapping", None),
        **fields,
        **pattern_of(kinds),
    )
    read.finish(known=("cache_implementation",))
    return config


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """Returns the config.json of a ModelConfig."""
    fields = gemma2.family_to_hf(config, MODEL_TYPE, ARCHITECTURE)
    full = next((kind.rope for kind in config.kinds if kind.window is None), None)
    slide = next((kind.rope for kind in config.kinds if kind.window is not None), None)
    full, slide = full or Rope(GLOBAL_THETA), slide or Rope(LOCAL_THETA)
    fields |= {"final_logit_softcapping": config.final_softcap}
    if slide.scaling == "default":  # the spelling of transformers 4
        return fields | rope_to_hf(full) | {"rope_local_base_freq": slide.theta}
    del fields["rope_theta"], fields["rope_scaling"]
    plain = {"rope_type": "default"}
    both = {FULL: full, SLIDING: slide}
    named = {
        kind: plain | rope_fields(rope) | {"rope_theta": rope.theta} for kind, rope in both.items()
    }
    return fields | {"rope_parameters": named}
