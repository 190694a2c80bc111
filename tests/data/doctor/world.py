"""Clean rows, and faults planted in them: what the doctor is measured on.

Rows are made of real stories where ../shared is there, and of made-up sentences where it is not.
"""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

_NAMES = (
    "cat", "dog", "bird", "fox", "mouse", "frog", "bear", "duck", "hen", "cow", "pig",
    "owl", "wolf", "fish",
)  # fmt: skip
_VERBS = (
    "found", "saw", "wanted", "loved", "carried", "lost", "drew", "painted", "followed",
    "counted", "washed", "hid",
)  # fmt: skip
_THINGS = (
    "ball", "box", "kite", "drum", "apple", "boat", "hat", "lamp", "stone", "leaf", "cake",
    "bell", "flower", "book", "shoe",
)  # fmt: skip
_PLACES = (
    "river", "hill", "garden", "barn", "school", "market", "forest", "beach", "kitchen",
    "bridge", "tower", "lake",
)  # fmt: skip
_ADJECTIVES = (
    "red", "small", "old", "shiny", "round", "soft", "green", "heavy", "tiny", "happy",
    "quiet", "strange", "cold",
)  # fmt: skip


def sentence(r: random.Random) -> str:
    one, two = r.sample(_ADJECTIVES, 2)
    return (
        f"The {one} {r.choice(_NAMES)} {r.choice(_VERBS)} a {two} {r.choice(_THINGS)} near the "
        f"{r.choice(_ADJECTIVES)} {r.choice(_PLACES)} and {r.choice(_VERBS)} it "
        f"{r.choice(('at noon', 'all day', 'in spring', 'with care', 'before lunch'))}."
    )


def made_rows(count: int, seed: int) -> list[dict[str, str]]:
    """Returns rows of about 400 characters, all different."""
    r = random.Random(seed)
    return [
        {
            "prompt": f"Story {i * 7919 % 100_003}. " + " ".join(sentence(r) for _ in range(2)),
            "completion": " ".join(sentence(r) for _ in range(3)),
        }
        for i in range(count)
    ]


def story_rows(path: Path, count: int) -> list[dict[str, str]]:
    """Returns rows of TinyStories, each of a part of a story that no other row has.

    About one in twenty of the stories holds mojibake; such parts are left out.
    """
    stories = json.loads(gzip.decompress(path.read_bytes()))
    rows = []
    for story in stories:
        words = " ".join(story.split()).split(" ")
        for start in range(0, len(words) - 90, 90):
            part = words[start : start + 90]
            if not " ".join(part).isascii():
                continue
            rows.append({"prompt": " ".join(part[:30]), "completion": " ".join(part[30:])})
    return rows[:count]


@dataclass
class World:
    """Rows as lines, and which of them have which fault.

    Attributes:
        lines: the JSON lines, or bytes that are none.
        planted: {kind: numbers of lines, from 1}.
    """

    lines: list[bytes]
    planted: dict[str, set[int]] = field(default_factory=dict)

    def write(self, path: Path) -> Path:
        path.write_bytes(b"".join(line + b"\n" for line in self.lines))
        return path


Fault = Callable[[dict[str, str], random.Random], dict[str, str]]


def _inside(words: str) -> Fault:
    """Puts words in the middle of the completion."""

    def plant(row: dict[str, str], r: random.Random) -> dict[str, str]:
        parts = row["completion"].split(" ")
        at = r.randrange(5, len(parts) - 5)
        text = words(r) if callable(words) else words
        return {**row, "completion": " ".join([*parts[:at], text, *parts[at:]])}

    return plant


def _digits(r: random.Random, count: int) -> str:
    return "".join(str(r.randrange(10)) for _ in range(count))


def card(r: random.Random) -> str:
    body = r.choice(("4", "51", "55")) + _digits(r, 15)
    body = body[:15]
    doubled = [int(d) * 2 if i % 2 == 0 else int(d) for i, d in enumerate(reversed(body))]
    total = sum(d - 9 if d > 9 else d for d in doubled)
    number = body + str(-total % 10)
    gap = r.choice(("", " ", "-"))
    return gap.join(number[i : i + 4] for i in range(0, 16, 4))


def iban(r: random.Random) -> str:
    country, body = r.choice((("DE", _digits(r, 18)), ("GB", "WEST" + _digits(r, 14))))
    value = int("".join(str(int(c, 36)) for c in body + country + "00"))
    number = f"{country}{98 - value % 97:02d}{body}"
    if r.random() < 0.5:
        return number
    return " ".join(number[i : i + 4] for i in range(0, len(number), 4))


def phone(r: random.Random) -> str:
    three, four = str(r.randrange(201, 989)), f"{r.randrange(1000, 9876)}"
    return r.choice(
        (
            f"({r.randrange(201, 989)}) {three}-{four}",
            f"{r.randrange(201, 989)}-{three}-{four}",
            f"+44 20 7{r.randrange(100, 999)} {four}",
            f"+49 30 {r.randrange(100000, 9876543)}",
            f"0{r.randrange(7100, 7999)} {r.randrange(100000, 987654)}",
            f"+1{r.randrange(201, 989)}{three}{four}",
        )
    )


_LETTERS = "ABCDEFGHJKLMNPQRSTUVWXYZ"
_MIXED = _LETTERS + _LETTERS.lower() + "23456789"


def secret(r: random.Random) -> str:
    def several(alphabet: str, count: int) -> str:
        return "".join(r.choice(alphabet) for _ in range(count))

    return r.choice(
        (
            "AK" + "IA" + several(_LETTERS + "234567", 16),
            "gh" + "p_" + several(_MIXED, 36),
            "sk" + "-proj-4" + several(_MIXED, 40),
            "-----BEGIN RSA " + f"PRIVATE KEY-----\nMII{several(_MIXED, 60)}\n-----END KEY-----",
        )
    )  # fmt: skip


def email(r: random.Random) -> str:
    name = r.choice(_NAMES)
    host = f"{r.choice(_PLACES)}.{r.choice(('com', 'co.uk', 'org'))}"
    return f"{name}.{r.choice(_THINGS)}{r.randrange(99)}@{host}"


def mojibake(r: random.Random) -> str:
    words = r.choice(("it’s “fine”", "naïve café", "Größe", "l’été"))
    return words.encode("utf-8").decode("cp1252", "replace").replace("\ufffd", "")


_CONTROLS = "\0\a\x1b\u202e"
_SPECIAL = ("<|im_end|>", "<|endoftext|>", "[INST]", "<|eot_id|>")
_REFUSES = "I'm sorry, but I can't help with that. "
FAULTS: dict[str, Fault] = {
    "email": _inside(email),
    "phone": _inside(phone),
    "card": _inside(card),
    "iban": _inside(iban),
    "secret": _inside(secret),
    "mojibake": _inside(mojibake),
    "replacement_character": _inside("caf\ufffd"),
    "control_character": _inside(lambda r: f"be{r.choice(_CONTROLS)}ll"),
    "special_token": _inside(lambda r: r.choice(_SPECIAL)),
    "lone_surrogate": _inside("odd \ud83d sign"),
    "empty_target": lambda row, r: {**row, "completion": r.choice(("", "  ", "\n\t"))},
    "malformed": lambda row, r: r.choice(
        ({"prompt": row["prompt"]}, {**row, "completion": 7}, {**row, "prompt": None})
    ),
    "refusal": lambda row, r: {**row, "completion": _REFUSES + row["completion"]},
    "boilerplate": lambda row, r: {**row, "completion": row["completion"] + " I hope this helps!"},
    "toxic": _inside("blasted"),
}  # fmt: skip


def plant(rows: list[dict[str, str]], each: int, seed: int) -> World:
    """Plants `each` faults of every kind that one line shows, each in a row of its own."""
    r = random.Random(seed)
    free = list(range(len(rows)))
    r.shuffle(free)
    lines = [json.dumps(row).encode() for row in rows]
    planted: dict[str, set[int]] = {}
    for kind, fault in FAULTS.items():
        for _ in range(each):
            at = free.pop()
            lines[at] = json.dumps(fault(rows[at], r)).encode()
            planted.setdefault(kind, set()).add(at + 1)
    for kind, damage in (
        ("invalid_json", lambda line: line[:-3]),
        ("not_utf8", lambda line: line.replace(b"e", b"\xe9", 1)),
    ):
        for _ in range(each):
            at = free.pop()
            lines[at] = damage(lines[at])
            planted.setdefault(kind, set()).add(at + 1)
    return World(lines, planted)


def edited(text: str, r: random.Random, share: float) -> str:
    """Returns a text in which a share of the words are others."""
    words = text.split(" ")
    for at in r.sample(range(len(words)), max(1, round(share * len(words)))):
        words[at] = r.choice(_NAMES + _THINGS + _PLACES)
    return " ".join(words)
