"""Which language a text is in, by py3langid: offline, small, no dependency but NumPy."""

from __future__ import annotations

from functools import cache
from typing import Any

UNKNOWN = "?"
# Characters that are read: few decide most often, more cost time.
_READ = (80, 240)
_LEAST_LETTERS, _SURE = 24, 0.9


@cache
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def language(text: str) -> str:
    """Returns an ISO 639-1 code, or UNKNOWN for a text that is short or of no clear language."""
    for size in _READ:
        head = text[:size]
        least = _LEAST_LETTERS if head.isascii() else _LEAST_LETTERS // 3
        if sum(map(str.isalpha, head)) >= least:
            code, probability = _identifier().classify(head)
            if probability >= _SURE and code != "zxx":
                return code
        if len(text) <= size:
            break
    return UNKNOWN
