"""A penalty for saying the same again."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from jaxtune.rl.rewards import arguments
from jaxtune.rl.rewards.reward import Scorer


def repetition(n: int = 3, unit: str = "words") -> Scorer:
    """Minus the share of n-grams that stood in the completion before: 0.0 none, near −1.0 all.

    A completion of fewer than n words is not penalised.

    Args:
        n: words (or tokens) in an n-gram.
        unit: words (case-folded) or tokens.
    """
    arguments.whole("n", n, 1)
    arguments.choice("unit", unit, ("words", "tokens"))

    def penalty(items: Sequence[Hashable]) -> float:
        grams = [tuple(items[i : i + n]) for i in range(len(items) - n + 1)]
        return len(set(grams)) / len(grams) - 1.0 if grams else 0.0

    def by_words(prompts: list, completions: list, **columns: list) -> list:
        return [penalty(text.casefold().split()) for text in completions]

    def by_tokens(prompts: list, completions: list, completion_ids: list, **columns: list) -> list:
        return [penalty(ids) for ids in completion_ids]

    return Scorer(by_words if unit == "words" else by_tokens)
