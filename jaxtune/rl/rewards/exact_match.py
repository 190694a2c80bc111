"""1 where the completion is the record's answer."""

from __future__ import annotations

import string

from jaxtune.rl.rewards import arguments
from jaxtune.rl.rewards.reward import Scorer

_PUNCTUATION = str.maketrans("", "", string.punctuation)


def exact_match(
    column: str = "answer",
    ignore_case: bool = False,
    ignore_punctuation: bool = False,
    ignore_space: bool = True,
) -> Scorer:
    """1.0 where the completion equals the answer, else 0.0.

    Args:
        column: field of the records: the answer, or a list of answers any of which will do; None:
            no score.
        ignore_case: compare case-folded.
        ignore_punctuation: leave out ASCII punctuation.
        ignore_space: strip both ends, and take any run of white space for one space.
    """
    arguments.text("column", column)
    arguments.flag("ignore_case", ignore_case)
    arguments.flag("ignore_punctuation", ignore_punctuation)
    arguments.flag("ignore_space", ignore_space)

    def normal(text: str) -> str:
        text = text.casefold() if ignore_case else text
        text = text.translate(_PUNCTUATION) if ignore_punctuation else text
        return " ".join(text.split()) if ignore_space else text

    def judge(completion: str, answer: str | list[str] | None) -> float | None:
        if answer is None:
            return None
        answers = answer if isinstance(answer, list | tuple) else [answer]
        return float(normal(completion) in {normal(str(a)) for a in answers})

    def score(prompts: list, completions: list, **columns: list) -> list[float | None]:
        return [judge(c, a) for c, a in zip(completions, columns[column], strict=True)]

    return Scorer(score, (column,))
