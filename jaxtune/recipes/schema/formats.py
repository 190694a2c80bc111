"""Which formats of data an objective learns from."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from jaxtune.core.errors import RequestError

NOT_GIVEN = "jsonl:(not given)"  # the source of data that a plan is made without
_TEXTS = ("chat", "completion", "instruction", "text", "tokens")
_PAIRS = ("preference",)
_PROMPTS = ("prompt",)

# A new objective is one line here.
FORMATS_OF: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "sft": _TEXTS,
        "pretrain": _TEXTS,  # it trains on "text" and "tokens" alone; see `rules`
        "distill": _TEXTS,
        "dpo": _PAIRS,
        "simpo": _PAIRS,
        "cpo": _PAIRS,
        "orpo": _PAIRS,
        "kto": ("unpaired", "preference"),
        "reward": ("preference", "ranked", "stepwise"),
        "grpo": _PROMPTS,
        "ppo": _PROMPTS,
    }
)
# Formats whose examples are trained in ways of their own, so that they do not mix with others.
_ALONE = ("stepwise",)


def splits_pairs(objective: str, format: str) -> bool:
    """Tells whether an objective reads each pair as two unpaired examples."""
    return format == "preference" and "unpaired" in FORMATS_OF[objective]


def check_formats(objective: str, section: str, entries: tuple[dict[str, Any], ...]) -> None:
    """Raises RequestError unless an objective can learn from the entries of `data.<section>`."""
    valid = FORMATS_OF[objective]
    for i, entry in enumerate(entries):
        format, key = entry["format"], f"data.{section}[{i}].format"
        if format not in valid:
            names = " or ".join(map(repr, valid))
            fitting = [name for name, formats in FORMATS_OF.items() if format in formats]
            raise RequestError(
                f"{format!r} contradicts objective.name = {objective!r}, which reads {names}; "
                f"{format!r} is read by {', '.join(fitting)}",
                key=key,
            )
        if format != entries[0]["format"] and {format, entries[0]["format"]} & {*_ALONE}:
            raise RequestError(
                f"{format!r} does not mix with {entries[0]['format']!r} in one run", key=key
            )


def check_overlong(objective: str, overlong: str) -> None:
    """Raises RequestError for prompts that are to be cut, which would ask something else."""
    if overlong == "truncate" and FORMATS_OF[objective] == _PROMPTS:
        raise RequestError(
            f"'truncate' contradicts objective.name = {objective!r}: a prompt is not cut; use "
            "'drop' or 'error'",
            key="data.overlong",
        )
