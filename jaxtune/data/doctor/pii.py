"""Personal data and secrets, by their form and, where they have one, their checksum."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple


class Match(NamedTuple):
    """Characters [start, end) of a text that are of a kind."""

    kind: str
    start: int
    end: int


_EMAIL = re.compile(
    r"(?<![\w.+-])[A-Za-z0-9][\w.+%-]{0,63}@(?:[A-Za-z0-9](?:[\w-]{0,61}[A-Za-z0-9])?\.)+[A-Za-z]{2,24}(?![\w-])"
)
_CARD = re.compile(r"(?<![\d.,+-])\d(?:[ -]?\d){11,18}(?![\d.]?\d)")
# International, with its plus; North American; with the national zero.
_PHONE = re.compile(
    r"(?<![\w+])\+[1-9]\d{0,2}[ .()-]{0,3}\d(?:[ .()/-]{0,2}\d){5,12}(?!\d)"
    r"|(?<![\w.,-])(?:1[ .-]?)?(?:\([2-9]\d{2}\) ?|[2-9]\d{2}[ .-])[2-9]\d{2}[ .-]\d{4}(?![\w-])"
    r"|(?<![\w.,/-])\(?0[1-9]\d{1,4}\)?[ /-]?\d{3,4}[ -]?\d{3,5}(?![\w.,-]?\d)"
)
_IBAN = re.compile(r"(?<![A-Za-z0-9])[A-Z]{2}\d{2}(?: ?[A-Z0-9]){11,30}")
# ISO 13616 registry: length by country.
_IBAN_LENGTHS = {
    country: length
    for length, countries in {
        15: "NO", 16: "BE", 18: "DK FI FO GL NL", 19: "MK SI", 20: "AT BA EE KZ LT LU XK",
        21: "CH HR LI LV", 22: "BG BH CR DE GB GE IE ME RS VA", 23: "AE GI IL IQ TL",
        24: "AD CZ ES MD PK RO SA SE SK TN VG", 25: "LY PT ST", 26: "IS TR",
        27: "FR GR IT MC MR SM", 28: "AL AZ BY CY DO GT HU LB PL SV", 29: "BR EG PS QA UA",
        30: "JO KW", 31: "MT SC", 32: "LC",
    }.items()
    for country in countries.split()
}  # fmt: skip
_SECRET = re.compile(
    r"-----BEGIN (?:[A-Z0-9]+ )*PRIVATE KEY(?: BLOCK)?-----"
    r"(?:[\s\S]{0,8000}?-----END [A-Z0-9 ]+-----)?"
    r"|(?<![A-Za-z0-9])(?:"
    r"(?:AKIA|ASIA)[A-Z0-9]{16}(?![A-Za-z0-9])"  # AWS
    r"|gh[pousr]_[A-Za-z0-9]{36,255}|github_pat_[A-Za-z0-9_]{60,255}"  # GitHub
    r"|glpat-[\w-]{20,}"  # GitLab
    r"|sk-(?:proj-|ant-|live-|svcacct-|or-)?(?=[\w-]*\d)[A-Za-z0-9][\w-]{19,}"  # OpenAI's form
    r"|(?:sk|rk)_(?:live|test)_[A-Za-z0-9]{20,}"  # Stripe
    r"|xox[abprs]-[A-Za-z0-9-]{10,}"  # Slack
    r"|AIza[\w-]{35}"  # Google
    r"|hf_[A-Za-z0-9]{30,}"  # Hugging Face
    r"|npm_[A-Za-z0-9]{36}"
    r"|eyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{10,}"  # JSON web token
    r")"
)
# Every telephone and card number has so many; a text without them is most often a quick no.
_MANY_DIGITS = re.compile(r"\d(?:[ .()/-]{0,3}\d){7}")
_NOT_DIGITS = re.compile(r"\D")


def find(text: str) -> list[Match]:
    """Returns what is personal or secret in a text, in order; parts do not overlap.

    >>> [m.kind for m in find("mail a.b@c.org, pay 4111 1111 1111 1111")]
    ['email', 'card']
    """
    found: list[Match] = []
    if "@" in text:
        found += (Match("email", *m.span()) for m in _EMAIL.finditer(text))
    found += (Match("secret", *m.span()) for m in _SECRET.finditer(text))
    found += _ibans(text)
    if _MANY_DIGITS.search(text):
        found += (Match("card", *m.span()) for m in _CARD.finditer(text) if is_card(m[0]))
        found += (Match("phone", *m.span()) for m in _PHONE.finditer(text) if _is_phone(m[0]))
    if len(found) < 2:
        return found
    out: list[Match] = []
    order = {"secret": 0, "iban": 1, "card": 2, "email": 3, "phone": 4}
    for match in sorted(found, key=lambda m: (order[m.kind], m.start)):
        if all(match.end <= other.start or match.start >= other.end for other in out):
            out.append(match)
    return sorted(out, key=lambda m: m.start)


def mask(text: str, kind: str | None = None) -> str:
    """Returns a text in which what is personal or secret, or of one kind, is its kind's name.

    >>> mask("write to a.b@c.org")
    'write to [email]'
    """
    out, at = [], 0
    for match in find(text):
        if kind not in (None, match.kind):
            continue
        out += [text[at : match.start], f"[{match.kind}]"]
        at = match.end
    return "".join(out) + text[at:]


def is_card(number: str) -> bool:
    """Whether digits have a card's prefix and length and pass Luhn's checksum (ISO/IEC 7812)."""
    digits = _NOT_DIGITS.sub("", number)
    return _network(digits) and luhn(digits)


def _network(digits: str) -> bool:
    size, two, four = len(digits), int(digits[:2]), int(digits[:4])
    return (
        (digits[0] == "4" and size in (13, 16, 19))
        or (size == 16 and (51 <= two <= 55 or 2221 <= four <= 2720))
        or (size == 15 and two in (34, 37))
        or (16 <= size <= 19 and (four == 6011 or two in (62, 64, 65) or 3528 <= four <= 3589))
        or (14 <= size <= 19 and (two in (36, 38, 39) or 300 <= four // 10 <= 305))
    )


def luhn(digits: str) -> bool:
    """Whether the last digit is the checksum of the others.

    >>> luhn("4111111111111111"), luhn("4111111111111112")
    (True, False)
    """
    doubled = [(2 * int(d)) if i % 2 else int(d) for i, d in enumerate(reversed(digits))]
    return sum(d - 9 if d > 9 else d for d in doubled) % 10 == 0


def is_iban(number: str) -> bool:
    """Whether country, length and checksum (ISO 7064, mod 97-10) of an IBAN are right.

    >>> is_iban("GB82WEST12345698765432"), is_iban("GB83WEST12345698765432")
    (True, False)
    """
    if _IBAN_LENGTHS.get(number[:2]) != len(number):
        return False
    return int("".join(str(int(c, 36)) for c in number[4:] + number[:4])) % 97 == 1


def _ibans(text: str) -> Iterator[Match]:
    for match in _IBAN.finditer(text):
        # Words in capitals may follow; the country says where the number ends.
        length, end = _IBAN_LENGTHS.get(match[0][:2], 0), match.start()
        number = ""
        while end < match.end() and len(number) < length:
            if text[end] != " ":
                number += text[end]
            end += 1
        if number and is_iban(number) and not text[end : end + 1].isalnum():
            yield Match("iban", match.start(), end)


def _is_phone(number: str) -> bool:
    digits = _NOT_DIGITS.sub("", number)
    if len(set(digits)) < 3:
        return False
    return 8 <= len(digits) <= 15 if number[0] == "+" else 10 <= len(digits) <= 12
