"""Real data as completion tasks for babyllama105, whose tokenizer knows 105 characters."""

from __future__ import annotations

import dataclasses
import gzip
import json
import random
import re
import unicodedata
from collections import Counter
from pathlib import Path

# The most tokens of an example, BOS and EOS included. The model has 256 positions, of which prompt
# and prefix tuning take 16; every method trains on the same examples.
SMS_LENGTH, RASBT_LENGTH, STORY_LENGTH = 160, 240, 240
SEED, HELD_OUT = 0, 0.2
SPELLED = {
    "\n": " ",
    "\t": " ",
    "#": "No.",
    "=": "-",
    "_": "-",
    "@": " at ",
    "{": "(",
    "}": ")",
    "£": "GBP ",
    "°": " degrees ",
}


@dataclasses.dataclass(frozen=True)
class Task:
    """A task, split into training and held-out examples.

    Attributes:
        name: of its files.
        title: of its table.
        source: path of the file below `shared/data`.
        prompt: the template, for the reader.
        train, held: (prompt, completion) pairs.
        length: the most tokens of an example.
        choices: the completions to choose from, for a classification.
        counts: records, and what became of those that did not fit.
    """

    name: str
    title: str
    source: str
    prompt: str
    train: list[tuple[str, str]]
    held: list[tuple[str, str]]
    length: int
    choices: tuple[str, ...]
    counts: dict[str, int]

    def write(self, directory: Path, limit: int | None = None) -> tuple[Path, Path]:
        """Writes the two parts as JSONL of the completion format; returns their paths."""
        paths = []
        for part, pairs in (("train", self.train), ("held", self.held)):
            paths.append(directory / f"{self.name}_{part}.jsonl")
            rows = [{"prompt": p, "completion": c} for p, c in pairs[:limit]]
            paths[-1].write_text("".join(json.dumps(row) + "\n" for row in rows))
        return paths[0], paths[1]


def characters(model: Path) -> set[str]:
    """Returns the characters that the model's tokenizer has an id for."""
    vocab = json.loads((model / "tokenizer.json").read_text())["model"]["vocab"]
    return {" " if token == "▁" else token for token in vocab if len(token) == 1}


def spell(text: str, known: set[str], counts: Counter) -> str:
    """Returns the text in known characters: a substitute, the letter without its accent, or '*'."""
    out = []
    for char in text:
        if char not in known:
            counts["characters spelled otherwise"] += 1
            char = SPELLED.get(char) or unicodedata.normalize("NFKD", char)[0]
            char = "*" if not all(c in known for c in char) else char
        out.append(char)
    return re.sub(" +", " ", "".join(out)).strip()


def tokens(prompt: str, completion: str) -> int:
    """Returns the tokens of an example: one a character, BOS, EOS and the leading space."""
    return len(prompt) + len(completion) + 3


def split(pairs: list[tuple[str, str]]) -> tuple[list, list]:
    """Returns (training, held-out) pairs, shuffled by SEED."""
    pairs = list(pairs)
    random.Random(SEED).shuffle(pairs)
    cut = round(len(pairs) * (1 - HELD_OUT))
    return pairs[:cut], pairs[cut:]


def sms_spam(data: Path, known: set[str]) -> Task:
    """SMS Spam: is a message spam or ham? Long messages lose their end."""
    source = "classification/sms_spam.tsv.gz"
    lines = gzip.decompress((data / source).read_bytes()).decode().splitlines()
    counts, pairs = Counter({"records": 0, "cut in the message": 0}), []
    for line in lines:
        label, _, message = line.partition("\t")
        if label not in ("ham", "spam"):
            counts["continuations of the line before"] += 1
            continue
        counts["records"] += 1
        # Both labels must fit behind the message, so that a cut one does not give them away.
        message, room = (
            spell(message, known, counts),
            SMS_LENGTH - tokens("Message:  Label:", " spam"),
        )
        counts["cut in the message"] += len(message) > room
        pairs.append((f"Message: {message[:room]} Label:", f" {label}"))
    return Task(
        "sms_spam",
        "SMS Spam",
        source,
        "Message: MESSAGE Label:",
        *split(pairs),
        SMS_LENGTH,
        (" ham", " spam"),
        dict(counts),
    )


def rasbt(data: Path, known: set[str]) -> Task:
    """rasbt's short instructions; an example that is too long is left out."""
    source = "instruction/rasbt_instruction_1100.json.gz"
    rows = json.loads(gzip.decompress((data / source).read_bytes()))
    counts, pairs = Counter(records=len(rows), dropped=0), []
    for row in rows:
        question, context, answer = (
            spell(row[name], known, counts) for name in ("instruction", "input", "output")
        )
        prompt = f"Task: {question}" + (f" Input: {context}" if context else "") + " Answer:"
        if not answer or tokens(prompt, f" {answer}") > RASBT_LENGTH:
            counts["dropped"] += 1
        else:
            pairs.append((prompt, f" {answer}"))
    return Task(
        "rasbt",
        "rasbt instructions",
        source,
        "Task: INSTRUCTION Input: INPUT Answer:",
        *split(pairs),
        RASBT_LENGTH,
        (),
        dict(counts),
    )


def stories(data: Path, count: int) -> list[str]:
    """Returns the first TinyStories, a run of line ends as one: what the model was trained on."""
    path = data / "texts/tinystories_1000.json.gz"
    texts = json.loads(gzip.decompress(path.read_bytes()))
    return [re.sub(r"\n+", "\n", text) for text in texts[:count]]
