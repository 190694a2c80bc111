"""The families by `model_type`, and what each can hold."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

from jaxtune.core.errors import RequestError, nearest
from jaxtune.models.config import ModelConfig
from jaxtune.models.families import (
    gemma,
    gemma2,
    gemma3,
    gpt2,
    gpt_neox,
    gpt_oss,
    granite,
    llama,
    mistral,
    mixtral,
    olmo2,
    phi3,
    qwen2,
    qwen3,
    qwen3_moe,
    score,
    smollm3,
)
from jaxtune.models.families.table import Weight

FAMILIES: dict[str, ModuleType] = {
    "llama": llama,
    "mistral": mistral,
    "mixtral": mixtral,
    "qwen2": qwen2,
    "qwen3": qwen3,
    "qwen3_moe": qwen3_moe,
    "olmo2": olmo2,
    "smollm3": smollm3,
    "granite": granite,
    "gpt_oss": gpt_oss,
    "gemma": gemma,
    "gemma2": gemma2,
    "gemma3_text": gemma3,
    "gpt2": gpt2,
    "gpt_neox": gpt_neox,
    "phi3": phi3,
}

# How a model is run, which no config.json says.
RUN_FIELDS = ("dtype", "attention", "remat", "quantize")


@dataclasses.dataclass(frozen=True)
class Family:
    """What a family file declares.

    Attributes:
        from_hf, to_hf: config.json to ModelConfig and back.
        table: its weight-name rows, for a model of this config.
        modules: the same by the names that transformers has in memory, which PEFT's files use.
        inert_tensors: regexes of tensors that carry no parameter.
        renamed: (regex of a whole tensor name, what replaces it) of older spellings in files.
    """

    from_hf: Callable[..., ModelConfig]
    to_hf: Callable[[ModelConfig], dict[str, Any]]
    table: Callable[[ModelConfig], tuple[Weight, ...]]
    modules: Callable[[ModelConfig], tuple[Weight, ...]]
    inert_tensors: tuple[str, ...]
    renamed: tuple[tuple[str, str], ...]


def family(name: str) -> Family:
    """Returns a family by name.

    Raises:
        RequestError: there is no such file in `models/families`.
    """
    if name not in FAMILIES:
        raise RequestError(
            f"models of family {name!r} cannot be read from or written to Hugging Face files in "
            f"this version; supported are {', '.join(FAMILIES)}",
            key="family",
        )
    module = FAMILIES[name]
    return Family(
        module.from_hf,
        module.to_hf,
        lambda config: (*module.table(config), score.WEIGHT),
        lambda config: (
            *getattr(module, "module_table", module.table)(config),
            score.WEIGHT,
        ),
        module.INERT_TENSORS,
        getattr(module, "RENAMED", ()),
    )


def from_hf(raw: Mapping[str, Any], where: object | None = None) -> ModelConfig:
    """Returns the ModelConfig of a parsed config.json of any family.

    Raises:
        RequestError: an unknown `model_type`, or what the family's `from_hf` refuses.
    """
    kind = raw.get("model_type")
    if kind is None:
        raise RequestError("the field is missing", key="model_type", where=where)
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise RequestError(
            f"{kind!r} is not supported; supported are {', '.join(FAMILIES)}"
            f"{nearest(str(kind), FAMILIES)}",
            key="model_type",
            where=where,
        )
    scorer = score.is_scorer(raw)
    if scorer:
        raw = score.as_language_model(raw, FAMILIES[kind].ARCHITECTURE, where)
    try:
        config = family(kind).from_hf(raw, where)
    except RequestError:
        raise
    except ValueError as error:  # what ModelConfig itself refuses
        raise RequestError(str(error), where=where) from error
    return score.as_scorer(config) if scorer else config


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """Returns the config.json of a ModelConfig.

    Raises:
        RequestError: the family's files cannot hold a part of the model, by name.
    """
    lost = not_held(config)
    if lost:
        raise RequestError(f"family {config.family!r} cannot hold {', '.join(lost)}")
    fields = family(config.family).to_hf(config)
    return fields if config.lm_head else fields | score.fields(config)


def not_held(config: ModelConfig) -> list[str]:
    """Returns `field=value` of each part that writing and reading config.json would lose."""
    chosen = family(config.family)
    if not config.lm_head and config.family not in score.ARCHITECTURES:
        return ["a score head, for which transformers has no class of this family"]
    if len(config.kinds) == 1 and config.kinds[0].rope is None and not config.learned_positions:
        return ["rope=None"]
    try:
        read = chosen.from_hf(chosen.to_hf(config))
        read = read if config.lm_head else score.as_scorer(read)
    except RequestError as refusal:  # the family's fields have no such value
        return [str(refusal.key)]
    return [
        f"{f.name}={getattr(config, f.name)!r}"
        for f in dataclasses.fields(ModelConfig)
        if f.name not in RUN_FIELDS and getattr(read, f.name) != getattr(config, f.name)
    ]
