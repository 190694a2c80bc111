"""Damage that is seen in the words alone: encoding, control characters, special tokens."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from functools import cache

from jaxtune.data.doctor.pii import Match

# C0 but tab, line feed and carriage return; C1; marks of direction (CVE-2021-42574); byte order
# mark; noncharacters. Joiners are left: scripts need them.
CONTROL = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ufeff\ufffe\uffff]"
)
_SURROGATE = re.compile("[\ud800-\udfff]")
# Of common models, where no tokenizer is given: only what no prose holds.
KNOWN_SPECIAL = (
    "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|begin_of_text|>", "<|end_of_text|>",
    "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>", "<|user|>",
    "<|assistant|>", "<|system|>", "<|end|>", "<start_of_turn>", "<end_of_turn>", "<bos>", "<eos>",
    "[INST]", "[/INST]", "<<SYS>>", "<</SYS>>", "<|pad|>", "<|channel|>", "<|message|>",
    "<|return|>",
)  # fmt: skip


def damage(text: str) -> Iterator[Match]:
    """Yields the first place of each kind of damage to the characters of a text."""
    found = CONTROL.search(text)
    if found:
        yield Match("control_character", *found.span())
    if text.isascii():
        return
    at = text.find("\ufffd")
    if at >= 0:
        yield Match("replacement_character", at, at + 1)
    found = _SURROGATE.search(text)
    if found:
        yield Match("lone_surrogate", *found.span())
    found = _badness().search(text)
    if found:
        yield Match("mojibake", *found.span())


@cache
def _badness() -> re.Pattern[str]:
    """Returns ftfy's pattern of character sequences that occur in mojibake and not in words."""
    from ftfy.badness import BADNESS_RE

    return BADNESS_RE


def repair_encoding(text: str) -> str:
    """Returns a text as it was before it was decoded with a wrong encoding, if that can be told."""
    from ftfy import fix_encoding

    return fix_encoding(text)


def special_pattern(tokens: Iterable[str]) -> re.Pattern[str] | None:
    """Returns a pattern of special tokens standing in text, the longest first; None if none."""
    # One-letter "specials" and plain words are words of the language too.
    marks = sorted({t for t in tokens if len(t) > 2 and not t.isalnum()}, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, marks))) if marks else None
