"""The pairs of HH-RLHF (harmless) as `benchmarks.results_reward` shows and divides them."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxtune.data.preferences import common_text

VALIDATED, FOLDS, SEED = 4, 5, 0
# Characters that are kept: of the end of the last question, and of the beginning of each answer.
QUESTION, ANSWER = 48, 256


class Pair(NamedTuple):
    """A record: the last question, and both answers whole."""

    question: str
    chosen: str
    rejected: str


def read(path: Path) -> list[Pair]:
    """Returns the pairs in the order of the file, white space as single spaces."""
    pairs = []
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for line in file:
            record = json.loads(line)
            prompt = common_text([record["chosen"], record["rejected"]])
            last = prompt.rpartition("\n\nHuman:")[2].rpartition("\n\nAssistant:")[0]
            sides = (record[side][len(prompt) :] for side in ("chosen", "rejected"))
            pairs.append(Pair(*(" ".join(text.split()) for text in (last, *sides))))
    return pairs


def write(path: Path, pairs: Sequence[Pair]) -> str:
    """Writes the pairs that a model sees and returns their source.

    Left out are those of which no difference is left: an empty answer, or two that begin alike.
    """
    with path.open("w", encoding="utf-8") as file:
        for pair in pairs:
            if comparable(pair):
                chosen, rejected = pair.chosen[:ANSWER], pair.rejected[:ANSWER]
                prompt = f"{pair.question[-QUESTION:]}\n"
                record = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
    return f"jsonl:{path}"


def divided(count: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Returns the parts of the pairs that settings are chosen on, and of those reported.

    Each half is a random one by the seed, in parts that are held out in turn.
    """
    order = np.random.default_rng(SEED).permutation(count)
    chosen, reported = order[: count // 2], order[count // 2 :]
    return np.array_split(chosen, VALIDATED), np.array_split(reported, FOLDS)


def comparable(pair: Pair) -> bool:
    """Tells whether the model sees two answers that differ."""
    chosen, rejected = pair.chosen[:ANSWER], pair.rejected[:ANSWER]
    return bool(chosen and rejected and chosen != rejected)
