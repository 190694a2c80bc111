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
        choices=("sft", "pretrain", "reward"),
        refused={name: _LATER for name in ("dpo", "grpo", "ppo", "distill")},
    ),
    Key(
        "objective.balance",
        "float",
        0.0,
        "coefficient of the load-balancing loss; for models with experts",
        low=0,
    ),
    Key(
        "objective.centering",
        "float",
        0.0,
        "coefficient of (chosen + rejected)², which holds scores around 0; of pairs",
        low=0,
        used_by=(("objective.name", ("reward",)),),
    ),
)
