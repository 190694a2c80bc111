"""The keys of `objective`: what is learned, and how."""

from __future__ import annotations

from jaxtune.recipes.schema_key import REQUIRED, Key
from jaxtune.recipes.schema_online import ONLINE

_LATER = "is not available in this version of jaxtune"

REWARD_ENTRY = (
    Key(
        "function",
        "text",
        REQUIRED,
        "name of a built-in reward (docs/rewards.md), module:function or path/to/file.py:function",
    ),
    Key("weight", "float", 1.0, "factor in the total; negative: a penalty"),
    Key("arguments", "table", {}, "keyword arguments of the function"),
    Key(
        "timeout",
        "float",
        300.0,
        "seconds that one call, over a whole batch, may take; None: no limit",
        above=0,
        optional=True,
    ),
    Key(
        "on_error",
        "choice",
        "stop",
        "a reward that raises, hangs or gives no number stops the run, or its samples are dropped",
        choices=("stop", "drop"),
    ),
)

OBJECTIVE: tuple[Key, ...] = (
    Key(
        "objective.name",
        "choice",
        "sft",
        "what is learned",
        choices=("sft", "pretrain", "reward", "grpo", "ppo"),
        refused={name: _LATER for name in ("dpo", "distill")},
    ),
    Key(
        "objective.balance",
        "float",
        0.0,
        "coefficient of the load-balancing loss; for models with experts",
        low=0,
    ),
    Key(
        "objective.rewards",
        "entries",
        REQUIRED,
        "what completions are scored by; the total is the weighted sum",
        entry=REWARD_ENTRY,
        used_by=(("objective.name", ("grpo", "ppo")),),
    ),
    Key(
        "objective.centering",
        "float",
        0.0,
        "coefficient of (chosen + rejected)², which holds scores around 0; of pairs",
        low=0,
        used_by=(("objective.name", ("reward",)),),
    ),
    *ONLINE,
)
