"""What the doctor looks for: the registry of kinds, as data."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from jaxtune.core.errors import RequestError, nearest

SEVERITIES = ("error", "warning", "info")


@dataclass(frozen=True)
class Kind:
    """One kind of finding.

    Attributes:
        name: as reports and flags write it.
        severity: "error", "warning" or "info".
        about: what a row of this kind has, in one line.
        fix: what `--fix` does to such a row: "remove", "change", or "" where it is left.
        needs: what must be given for it to be looked for: "tokenizer", "seq_len", "splits" (two
            or more), "against" or "words"; "" for nothing.
    """

    name: str
    severity: str
    about: str
    fix: str = ""
    needs: str = ""


# The order is that of the bits in a row's flags: at most 64, and new ones go to the end.
ALL = (
    Kind("not_utf8", "error", "the line is not UTF-8", "remove"),
    Kind("invalid_json", "error", "the line is not a JSON object", "remove"),
    Kind("malformed", "error", "a field is missing, or has a wrong type", "remove"),
    Kind("empty_target", "error", "what is to be learnt is empty or white space", "remove"),
    Kind(
        "role_order",
        "error",
        "roles are unknown or out of order, or the last is no assistant's",
        "remove",
    ),
    Kind("lone_surrogate", "error", "half of a surrogate pair, which no tokenizer takes", "remove"),
    Kind(
        "template_refused",
        "error",
        "the chat template or the renderer refuses the row",
        "remove",
        "tokenizer",
    ),
    Kind("no_target", "error", "no token of the row is trained", "remove", "tokenizer"),
    Kind(
        "doubled_bos", "error", "two beginning-of-sequence tokens in a row", "change", "tokenizer"
    ),
    Kind(
        "missing_terminator",
        "error",
        "a trained turn does not end with a trained terminator: the model would not stop",
        "",
        "tokenizer",
    ),
    Kind("split_leak", "error", "the same row is in another split", "remove", "splits"),
    Kind(
        "contamination",
        "error",
        "13 words in a row of an evaluation item, or all of a shorter one",
        "remove",
        "against",
    ),
    Kind("secret", "error", "a key, token or private key block", "change"),
    Kind("duplicate", "warning", "the same text as an earlier row", "remove"),
    Kind(
        "near_duplicate",
        "warning",
        "nearly the text of an earlier row (Jaccard of character 5-grams)",
        "remove",
    ),
    Kind(
        "near_split_leak",
        "warning",
        "nearly the text of a row in another split",
        "remove",
        "splits",
    ),
    Kind(
        "near_contamination",
        "warning",
        "most word 3-grams of an evaluation item",
        "remove",
        "against",
    ),
    Kind("conflict", "warning", "the same prompt as another row, with another answer"),
    Kind("same_pair", "error", "the chosen and the rejected answer are the same", "remove"),
    Kind("target_lost", "warning", "cut at seq_len, no target would be left", "", "seq_len"),
    Kind("overlong", "warning", "more tokens than seq_len", "", "seq_len"),
    Kind("special_token", "warning", "the text holds a special token as words", "change"),
    Kind("mojibake", "warning", "text decoded with a wrong encoding, such as â€™ for ’", "change"),
    Kind("replacement_character", "warning", "U+FFFD stands where bytes were lost"),
    Kind(
        "control_character",
        "warning",
        "control characters, or ones that turn the direction of writing",
        "change",
    ),
    Kind("email", "warning", "an e-mail address", "change"),
    Kind("phone", "warning", "a telephone number", "change"),
    Kind(
        "card",
        "warning",
        "a payment card number (prefix, length and Luhn's checksum are right)",
        "change",
    ),
    Kind(
        "iban",
        "warning",
        "a bank account (IBAN: country, length and mod-97 checksum are right)",
        "change",
    ),
    Kind("toxic", "warning", "a word of the list given with --words", "remove", "words"),
    Kind("other_language", "info", "another language than most rows have"),
    Kind("refusal", "info", "the answer refuses"),
    Kind("boilerplate", "info", "the answer has stock phrases of assistants"),
    Kind("turn_order", "info", "two turns of the same role in a row, or the assistant begins"),
)
BY_NAME = {kind.name: kind for kind in ALL}
BIT = {kind.name: 1 << at for at, kind in enumerate(ALL)}


def select(text: str, key: str) -> frozenset[str]:
    """Returns the names of kinds in a comma-separated list of kinds and severities.

    A severity stands for its kinds and those of worse severities: `warning` means errors too.

    Raises:
        RequestError: for an unknown name, with the nearest.

    >>> "secret" in select("warning", "--fail_on"), "email" in select("error", "--fail_on")
    (True, False)
    """
    chosen: set[str] = set()
    for name in filter(None, (part.strip() for part in text.split(","))):
        if name in SEVERITIES:
            worst = SEVERITIES[: SEVERITIES.index(name) + 1]
            chosen.update(kind.name for kind in ALL if kind.severity in worst)
        elif name in BY_NAME:
            chosen.add(name)
        else:
            valid = [*SEVERITIES, *BY_NAME]
            raise RequestError(f"unknown kind {name!r}{nearest(name, valid)}", key=key)
    return frozenset(chosen)


def names_of(flags: int) -> list[str]:
    """Returns the names whose bits are set."""
    return [name for name, bit in BIT.items() if flags & bit]


def markdown_table(kinds: Iterable[Kind] = ALL) -> str:
    """Returns the registry as a Markdown table, for docs/doctor.md."""
    lines = ["| kind | severity | a row of this kind | `--fix` | needs |\n|---|---|---|---|---|\n"]
    for kind in kinds:
        needs = f"`--{kind.needs}`" if kind.needs not in ("", "splits") else kind.needs
        fix = {"remove": "removes", "change": "changes", "": ""}[kind.fix]
        lines.append(f"| `{kind.name}` | {kind.severity} | {kind.about} | {fix} | {needs} |\n")
    return "".join(lines)
