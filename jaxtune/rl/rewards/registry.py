"""The rewards that come with jaxtune, by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jaxtune.rl.rewards.contains import contains
from jaxtune.rl.rewards.exact_match import exact_match
from jaxtune.rl.rewards.reward import Scorer

LoadModel = Callable[[str], Any]

BUILT_IN: dict[str, Callable[..., Scorer]] = {
    "exact_match": exact_match,
    "contains": contains,
}
NEEDS_MODEL = ("reward_model",)
