"""1 where the completion contains a word."""

from __future__ import annotations

import re

from jaxtune.rl.rewards import arguments
from jaxtune.rl.rewards.reward import Scorer


def contains(
    word: str | None = None,
    column: str | None = None,
    ignore_case: bool = True,
    whole_word: bool = True,
) -> Scorer:
    """1.0 where the completion contains the word, else 0.0; of several words, the share.

    Args:
        word: the same for every sample.
        column: field of the records: a word or a list of words; None: no score. Exactly one of
            `word` and `column` is given.
        ignore_case: whether "Dog" is "dog".
        whole_word: whether "dog" is not in "dogma".
    """
    arguments.expect((word is None) != (column is None), "word", word, "either `word` or `column`")
    for name, value in (("word", word), ("column", column)):
        if value is not None:
            arguments.text(name, value)
    arguments.flag("ignore_case", ignore_case)
    arguments.flag("whole_word", whole_word)
    flags = re.IGNORECASE if ignore_case else 0

    def judge(completion: str, wanted: str | list[str] | None) -> float | None:
        words = [wanted] if isinstance(wanted, str) else list(wanted or ())
        if not words:
            return None
        found = 0
        for one in words:
            found += bool(re.search(_pattern(str(one), whole_word), completion, flags))
        return found / len(words)

    def score(prompts: list, completions: list, **columns: list) -> list[float | None]:
        wanted = columns[column] if column else [word] * len(completions)
        return [judge(c, w) for c, w in zip(completions, wanted, strict=True)]

    return Scorer(score, (column,) if column else ())


def _pattern(word: str, whole: bool) -> str:
    # Not \b, which fails beside a word that begins or ends with punctuation, such as "C++".
    return rf"(?<!\w){re.escape(word)}(?!\w)" if whole else re.escape(word)
