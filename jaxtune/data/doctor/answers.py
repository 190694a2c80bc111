"""What answers are like: refusals, stock phrases; and turns that are odd."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence

from jaxtune.data.doctor.pii import Match

_REFUSED = (
    "help|assist|provide|answer|comply|support|do that|fulfil|continue|give|share|discuss|engage"
    "|create|write|generate"
)
_REFUSAL = re.compile(
    r"\bI(?:['’]?m| am) (?:really |very |so )?sorry,? but (?:I|as an)"
    r"|\bI(?:['’]m| am) (?:unable|not able) to (?:assist|help|provide|answer|comply|fulfil)"
    rf"|\bI (?:can['’]?t|cannot|can not|won['’]t|will not) (?:{_REFUSED})\b(?! but\b)"
    r"|\bI (?:must|have to) (?:decline|refuse)"
    r"|\bmy (?:ethical )?(?:programming|guidelines) (?:prevents?|prohibits?|do not allow)"
    r"|\bas an AI(?: language model| model| assistant)?,? "
    r"I (?:can['’]?t|cannot|do not|don['’]?t|am (?:not able|unable))",
    re.IGNORECASE,
)
# Looked for first, since searching with every case costs much more; in lower case.
_HINTS = {
    "refusal": ("sorry", "unable", "not able", "can't", "can’t", "cant ", "cannot", "can not",
                "won't", "won’t", "will not", "i must", "i have to", "my ", "as an ai"),
    "boilerplate": ("as a", "an ai", "i am a", "i hope this", "knowledge cut", "let me know",
                    "feel free", "anything else", "certainly", "absolutely", "of course", "sure",
                    "great question"),
}  # fmt: skip
_BOILERPLATE = re.compile(
    r"\bas an? (?:AI|artificial intelligence|large language model|AI language model)\b"
    r"|\bI['’]m (?:just )?an AI\b|\bI am an? (?:AI|language model)\b"
    r"|\bI hope this (?:helps|email finds you)|\bmy knowledge cut-?off\b"
    r"|\blet me know if you (?:have|need)\b|\bfeel free to (?:ask|reach out)\b"
    r"|\bis there anything else I can (?:help|assist)"
    r"|^(?:certainly|absolutely|of course|sure thing|great question)[!,]",
    re.IGNORECASE,
)


def phrases(answer: str) -> Iterator[Match]:
    """Yields a refusal and a stock phrase, if the answer has them."""
    lower = answer.lower()
    for kind, pattern in (("refusal", _REFUSAL), ("boilerplate", _BOILERPLATE)):
        hinted = any(hint in lower for hint in _HINTS[kind])
        found = pattern.search(answer) if hinted else None
        if found:
            yield Match(kind, *found.span())


def odd_turns(roles: Sequence[str]) -> str:
    """Says what is odd in the order of roles that formats let pass; "" if nothing."""
    spoken = [role for role in roles if role not in ("system", "developer")]
    if spoken and spoken[0] == "assistant":
        return "the assistant begins"
    for at, (one, two) in enumerate(itertools.pairwise(spoken)):
        if one == two and one != "tool":
            return f"turns {at} and {at + 1} are both the {one}'s"
    return ""
