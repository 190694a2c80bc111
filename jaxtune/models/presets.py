"""Named model sizes, for random initialisation, plans and tests.

Dimensions are those of each model's published config.json; `tests/models/test_presets.py` holds
the published parameter counts.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from jaxtune.core.errors import RequestError, nearest
from jaxtune.core.quantize import KINDS
from jaxtune.models.attention_backends import NAMES
from jaxtune.models.config import Experts, LayerKind, ModelConfig, pattern_of
from jaxtune.models.layers import ACTIVATIONS, CLIPPED
from jaxtune.models.rope import SCALINGS, Rope


def _llama3_rope(factor: float) -> Rope:
    return Rope(
        theta=500000.0,
        scaling="llama3",
        factor=factor,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_context=8192,
    )


def _gemma2(hidden: int, inner: int, layers: int, heads: int) -> ModelConfig:
    return ModelConfig(
        vocab_size=256000,
        hidden_size=hidden,
        intermediate_size=inner,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=heads // 2,
        head_dim=256,
        max_position_embeddings=8192,
        family="gemma2",
        norm_eps=1e-6,
        norm_unit_offset=True,
        norm_placement="both",
        activation="gelu_tanh",
        kinds=(LayerKind(4096), LayerKind(None)),
        pattern=(0, 1),
        attention_scale=256**-0.5,
        attention_softcap=50.0,
        final_softcap=30.0,
        embedding_scale=math.sqrt(hidden),
        tie_embeddings=True,
    )


PRESETS: dict[str, ModelConfig] = {
    # Ours: 1,016,960 parameters with a vocabulary of 1,024.
    "tiny-1m": ModelConfig(
        vocab_size=1024,
        hidden_size=128,
        intermediate_size=448,
        num_layers=4,
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        max_position_embeddings=1024,
        tie_embeddings=True,
    ),
    # Ours: 20,260,224 parameters with a vocabulary of 8,192.
    "small-20m": ModelConfig(
        vocab_size=8192,
        hidden_size=384,
        intermediate_size=896,
        num_layers=12,
        num_heads=6,
        num_kv_heads=2,
        head_dim=64,
        max_position_embeddings=2048,
        tie_embeddings=True,
    ),
    # https://huggingface.co/HuggingFaceTB/SmolLM2-135M
    "smollm2-135m": ModelConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_layers=30,
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
        max_position_embeddings=8192,
        kinds=(LayerKind(rope=Rope(theta=100000.0)),),
        tie_embeddings=True,
        initializer_range=0.041666666666666664,
    ),
    # https://huggingface.co/openai-community/gpt2
    "gpt2-124m": ModelConfig(
        vocab_size=50257,
        hidden_size=768,
        intermediate_size=3072,
        num_layers=12,
        num_heads=12,
        num_kv_heads=12,
        head_dim=64,
        max_position_embeddings=1024,
        family="gpt2",
        norm="layer",
        activation="gelu_tanh",
        gated=False,
        attention_bias=True,
        attention_out_bias=True,
        mlp_bias=True,
        learned_positions=True,
        kinds=(LayerKind(rope=None),),
        tie_embeddings=True,
    ),
    # https://huggingface.co/Qwen/Qwen2.5-0.5B
    "qwen2.5-0.5b": ModelConfig(
        vocab_size=151936,
        hidden_size=896,
        intermediate_size=4864,
        num_layers=24,
        num_heads=14,
        num_kv_heads=2,
        head_dim=64,
        max_position_embeddings=32768,
        family="qwen2",
        norm_eps=1e-6,
        attention_bias=True,
        kinds=(LayerKind(rope=Rope(theta=1000000.0)),),
        tie_embeddings=True,
    ),
    # https://huggingface.co/meta-llama/Llama-3.2-1B
    "llama3.2-1b": ModelConfig(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_layers=16,
        num_heads=32,
        num_kv_heads=8,
        head_dim=64,
        max_position_embeddings=131072,
        kinds=(LayerKind(rope=_llama3_rope(32.0)),),
        tie_embeddings=True,
    ),
    # https://huggingface.co/google/gemma-2-2b
    "gemma2-2b": _gemma2(2304, 9216, 26, 8),
    # https://huggingface.co/google/gemma-2-9b
    "gemma2-9b": _gemma2(3584, 14336, 42, 16),
    # https://huggingface.co/meta-llama/Llama-3.1-8B
    "llama3.1-8b": ModelConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        max_position_embeddings=131072,
        kinds=(LayerKind(rope=_llama3_rope(8.0)),),
    ),
    # https://huggingface.co/meta-llama/Llama-3.1-70B
    "llama3.1-70b": ModelConfig(
        vocab_size=128256,
        hidden_size=8192,
        intermediate_size=28672,
        num_layers=80,
        num_heads=64,
        num_kv_heads=8,
        head_dim=128,
        max_position_embeddings=131072,
        kinds=(LayerKind(rope=_llama3_rope(8.0)),),
    ),
    # https://huggingface.co/Qwen/Qwen3-8B
    "qwen3-8b": ModelConfig(
        vocab_size=151936,
        hidden_size=4096,
        intermediate_size=12288,
        num_layers=36,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        max_position_embeddings=40960,
        family="qwen3",
        norm_eps=1e-6,
        qk_norm="head",
        kinds=(LayerKind(rope=Rope(theta=1000000.0)),),
    ),
    # https://huggingface.co/Qwen/Qwen3-30B-A3B
    "qwen3-30b-a3b": ModelConfig(
        vocab_size=151936,
        hidden_size=2048,
        intermediate_size=768,
        num_layers=48,
        num_heads=32,
        num_kv_heads=4,
        head_dim=128,
        max_position_embeddings=40960,
        family="qwen3_moe",
        norm_eps=1e-6,
        qk_norm="head",
        kinds=(LayerKind(rope=Rope(theta=1000000.0)),),
        experts=Experts(count=128, per_token=8),
    ),
}


# What the fields that name a part may say.
CHOICES = {
    "norm": ("rms", "layer"),
    "activation": (*ACTIVATIONS, CLIPPED),
    "scaling": SCALINGS,
    "norm_placement": ("pre", "post", "both"),
    "qk_norm": ("none", "head", "full"),
    "attention": NAMES,
    "remat": ("none", "dots", "block"),
    "dtype": ("bfloat16", "float32"),
    "quantize": ("none", *KINDS),
}


def preset(name: str) -> ModelConfig:
    """Returns the ModelConfig of a named size.

    Raises:
        RequestError: the name is unknown.
    """
    if name not in PRESETS:
        raise RequestError(
            f"unknown preset {name!r}{nearest(name, PRESETS)}; presets are {', '.join(PRESETS)}",
            key="model.preset",
        )
    return PRESETS[name]


def with_overrides(config: ModelConfig, overrides: Mapping[str, Any]) -> ModelConfig:
    """Returns `config` with the fields of `model.overrides`.

    `rope` is a mapping of Rope's fields, for the layers that have a rotary embedding, `windows` the
    sliding-window sizes of a repeating pattern of layers, `experts` a mapping of Experts' fields.

    Raises:
        RequestError: an unknown field, a value that it cannot have, or a contradiction.
    """
    values = dict(overrides)
    for name in ("kinds", "pattern"):
        if name in values:
            raise RequestError("say `rope` and `windows` instead", key=f"model.overrides.{name}")
    try:
        if "windows" in values:
            config = _with_windows(config, values.pop("windows"))
        if "rope" in values:
            config = _with_rope(config, values.pop("rope"))
        if "experts" in values:
            fields = _mapping(values.pop("experts"), "model.overrides.experts")
            base = config.experts or Experts(8, 2)
            checked = _checked(base, fields, "model.overrides.experts")
            values["experts"] = dataclasses.replace(base, **checked)
        experts = values.pop("experts", config.experts)
        checked = _checked(config, values, "model.overrides")
        return dataclasses.replace(config, experts=experts, **checked)
    except ValueError as error:
        raise RequestError(str(error), key="model.overrides") from error


def _mapping(value: Any, key: str) -> dict[str, Any]:
    if not hasattr(value, "items"):
        raise RequestError(f"an object is wanted, not {value!r}", key=key)
    return dict(value)


def _with_rope(config: ModelConfig, value: Any) -> ModelConfig:
    fields = _mapping(value, "model.overrides.rope")
    checked = _checked(Rope(), fields, "model.overrides.rope")
    kinds = tuple(
        kind
        if kind.rope is None
        else dataclasses.replace(kind, rope=dataclasses.replace(kind.rope, **checked))
        for kind in config.kinds
    )
    return dataclasses.replace(config, kinds=kinds)


def _with_windows(config: ModelConfig, value: Any) -> ModelConfig:
    if not isinstance(value, list | tuple) or not value or not all(map(_is_window, value)):
        raise RequestError(
            f"a list of sizes and nulls is wanted, not {value!r}", key="model.overrides.windows"
        )
    kinds = [LayerKind(window, config.kinds[0].rope) for window in value]
    return dataclasses.replace(config, **pattern_of(kinds))


def _checked(spec: Any, values: Mapping[str, Any], key: str) -> dict[str, Any]:
    names = [f.name for f in dataclasses.fields(spec)]
    result = {}
    for name, value in values.items():
        if name not in names:
            raise RequestError(
                f"no such field of a model{nearest(name, names)}", key=f"{key}.{name}"
            )
        now = getattr(spec, name)
        if isinstance(now, tuple) and isinstance(value, list):
            value = tuple(value)
        wanted = float if now is None else type(now)
        if wanted is float and type(value) is int:
            value = float(value)
        if type(value) is not wanted:
            raise RequestError(f"{wanted.__name__} is wanted, not {value!r}", key=f"{key}.{name}")
        if type(value) in (int, float) and not value > 0:
            raise RequestError(f"{value!r} is not positive", key=f"{key}.{name}")
        if name in CHOICES and value not in CHOICES[name]:
            raise RequestError(
                f"{value!r} is not one of {', '.join(CHOICES[name])}"
                f"{nearest(value, CHOICES[name])}",
                key=f"{key}.{name}",
            )
        result[name] = value
    return result


def _is_window(size: Any) -> bool:
    return size is None or (type(size) is int and size > 0)
