"""Reward models in Hugging Face files: AutoModelForSequenceClassification with one label."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxtune.core.errors import RequestError
from jaxtune.models.config import ModelConfig
from jaxtune.models.families.table import Weight

# The classes of transformers 5 by family; there is none for Granite.
ARCHITECTURES = {
    "llama": "LlamaForSequenceClassification",
    "mistral": "MistralForSequenceClassification",
    "mixtral": "MixtralForSequenceClassification",
    "qwen2": "Qwen2ForSequenceClassification",
    "qwen3": "Qwen3ForSequenceClassification",
    "qwen3_moe": "Qwen3MoeForSequenceClassification",
    "olmo2": "Olmo2ForSequenceClassification",
    "smollm3": "SmolLM3ForSequenceClassification",
    "gpt_oss": "GptOssForSequenceClassification",
    "gemma": "GemmaForSequenceClassification",
    "gemma2": "Gemma2ForSequenceClassification",
    "gemma3_text": "Gemma3TextForSequenceClassification",
    "gpt2": "GPT2ForSequenceClassification",
    "gpt_neox": "GPTNeoXForSequenceClassification",
    "phi3": "Phi3ForSequenceClassification",
}
WEIGHT = Weight("score.weight", "score/kernel", transpose=True)


def is_scorer(raw: Mapping[str, Any]) -> bool:
    """Tells whether a parsed config.json is that of a sequence classifier."""
    named = raw.get("architectures")
    return isinstance(named, list) and any(name in ARCHITECTURES.values() for name in named)


def as_language_model(
    raw: Mapping[str, Any], architecture: str, where: object | None = None
) -> dict[str, Any]:
    """Returns the config.json of the language model that has a classifier's layers.

    Args:
        raw: the classifier's config.json.
        architecture: of the language model.
        where: the file, for messages.

    Raises:
        RequestError: it is of another family than its `model_type`, or has not one label.
    """
    kind = raw["model_type"]
    if ARCHITECTURES.get(kind) not in raw["architectures"]:
        raise RequestError(
            f"{raw['architectures']!r} is not supported; for {kind} only "
            f"{ARCHITECTURES.get(kind, architecture)!r} is",
            key="architectures",
            where=where,
        )
    labels = raw.get("id2label")
    # transformers leaves both fields away where there are two labels
    count = len(labels) if isinstance(labels, Mapping) else raw.get("num_labels", 2)
    if count != 1:
        raise RequestError(f"{count} labels; a reward model has 1", key="id2label", where=where)
    kept = {key: value for key, value in raw.items() if key != "num_labels"}
    return kept | {"architectures": [architecture]}


def as_scorer(config: ModelConfig) -> ModelConfig:
    """Returns the config of a model with the same layers under a score head alone."""
    return dataclasses.replace(config, lm_head=False, score_head=True, tie_embeddings=False)


def fields(config: ModelConfig) -> dict[str, Any]:
    """Returns the config.json fields of a reward model's class."""
    return {
        "architectures": [ARCHITECTURES[config.family]],
        "id2label": {"0": "reward"},
        "label2id": {"reward": 0},
        "problem_type": "regression",
    }
