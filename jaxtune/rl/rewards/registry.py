"""The rewards that come with jaxtune, by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jaxtune.rl.rewards.code import code
from jaxtune.rl.rewards.contains import contains
from jaxtune.rl.rewards.exact_match import exact_match
from jaxtune.rl.rewards.length import length
from jaxtune.rl.rewards.math_answer import math
from jaxtune.rl.rewards.pattern import format, regex
from jaxtune.rl.rewards.repetition import repetition
from jaxtune.rl.rewards.reward import Scorer
from jaxtune.rl.rewards.reward_model import reward_model

LoadModel = Callable[[str], Any]

BUILT_IN: dict[str, Callable[..., Scorer]] = {
    make.__name__: make
    for make in (
        exact_match,
        contains,
        regex,
        format,
        length,
        repetition,
        math,
        code,
        reward_model,
    )
}
NEEDS_MODEL = ("reward_model",)
