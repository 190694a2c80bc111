"""1 where the completion is as long as asked, less the further it is off."""

from __future__ import annotations

from jaxtune.rl.rewards import arguments
from jaxtune.rl.rewards.reward import Scorer

UNITS = ("tokens", "words", "characters")


def length(low: int = 0, high: int | None = None, unit: str = "tokens", slack: int = 0) -> Scorer:
    """1.0 for a length within [low, high], falling in a line to 0.0 at `slack` + 1 beyond it.

    Args:
        low, high: closed bounds; high None: no upper one.
        unit: tokens (with the one that ends the completion), words or characters.
        slack: how far outside a length still earns something.
    """
    arguments.whole("low", low, 0)
    if high is not None:
        arguments.whole("high", high, low)
    arguments.choice("unit", unit, UNITS)
    arguments.whole("slack", slack, 0)

    def worth(size: int) -> float:
        off = max(low - size, 0 if high is None else size - high, 0)
        return max(0.0, 1.0 - off / (slack + 1))

    def by_tokens(prompts: list, completions: list, completion_ids: list, **columns: list) -> list:
        return [worth(len(ids)) for ids in completion_ids]

    def by_words(prompts: list, completions: list, **columns: list) -> list:
        return [worth(len(text.split())) for text in completions]

    def by_characters(prompts: list, completions: list, **columns: list) -> list:
        return [worth(len(text)) for text in completions]

    return Scorer({"tokens": by_tokens, "words": by_words, "characters": by_characters}[unit])
