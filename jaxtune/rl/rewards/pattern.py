"""1 where the completion fits a regular expression."""

from __future__ import annotations

from jaxtune.rl.rewards import arguments
from jaxtune.rl.rewards.reward import Scorer


def regex(pattern: str) -> Scorer:
    """1.0 where the expression matches anywhere in the completion, else 0.0.

    Args:
        pattern: of Python's `re`; `.` matches line ends too, `(?i)` at its start ignores case.
    """
    found = arguments.pattern("pattern", pattern).search
    return Scorer(
        lambda prompts, completions, **columns: [float(bool(found(c))) for c in completions]
    )


def format(pattern: str) -> Scorer:
    """1.0 where the expression matches the completion as a whole, else 0.0.

    White space at both ends does not count.

    Args:
        pattern: as for `regex`, such as `<think>.*</think>\\s*<answer>.*</answer>`.
    """
    matches = arguments.pattern("pattern", pattern).fullmatch
    return Scorer(
        lambda prompts, completions, **columns: [
            float(bool(matches(c.strip()))) for c in completions
        ]
    )
