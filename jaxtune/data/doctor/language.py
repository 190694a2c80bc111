"""Which language a text is in, by py3langid: offline, small, no dependency but NumPy."""

from __future__ import annotations

from functools import cache
from typing import Any

UNKNOWN = "?"
# So many characters decide; more cost time.
_READ, _LEAST_LETTERS, _SURE = 160, 24, 0.9


@cache
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def language(text: str) -> str:
    """Returns an ISO 639-1 code, or UNKNOWN for a text that is short or of no clear language."""
    head = text[:_READ]
    if sum(map(str.isalpha, head)) < (_LEAST_LETTERS if head.isascii() else _LEAST_LETTERS // 3):
        return UNKNOWN
    code, probability = _identifier().classify(head)
    return code if probability >= _SURE and code != "zxx" else UNKNOWN
