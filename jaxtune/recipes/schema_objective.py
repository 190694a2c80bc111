"""The keys of `objective`: what is learned, and how."""

from __future__ import annotations

from jaxtune.recipes.schema_key import Key

_LATER = "is not available in this version of jaxtune"

OBJECTIVE: tuple[Key, ...] = (
    Key(
        "objective.name",
        "choice",
        "sft",
        "what is learned",
        choices=("sft", "pretrain"),
        refused={name: _LATER for name in ("reward", "dpo", "grpo", "ppo", "distill")},
    ),
    Key(
        "objective.balance",
        "float",
        0.0,
        "coefficient of the load-balancing loss; for models with experts",
        low=0,
    ),
)
