"""Evaluation items in the data: runs of 13 words, and most of an item's word 3-grams.

A run of 13 words in common is the rule of GPT-3 (Brown et al. 2020, arXiv:2005.14165, appendix C);
as there, a run that more than ten items share says nothing. An item with fewer words must occur
whole. The second measure is the containment of Broder 1997 and finds items that were edited.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxtune.core.errors import RequestError, nearest
from jaxtune.data.doctor.ngrams import Words, words_only
from jaxtune.data.doctor.rows import Fault, open_rows
from jaxtune.data.doctor.settings import Evaluation
from jaxtune.data.doctor.view import strings

RUN, SHORTEST = 13, 5
PART, LEAST_PARTS, CONTAINED = 3, 8, 0.6
_SHARED_BY = 10
_QUESTIONS = ("context", "question", "query", "prompt", "instruction", "input", "problem", "text")
# Words of the evaluation's form, not of the item.
_FORM = ("question", "passage", "answer", "q", "a")


class Hit(NamedTuple):
    """A text that holds an item: of which kind, which item, and the share of its n-grams."""

    kind: str
    text: int
    item: int
    share: float


@dataclass(frozen=True)
class Index:
    """Hashed n-grams of evaluation items.

    Attributes:
        names: of the evaluation sets.
        set_of: int32 [items], number of the set.
        lines: int64 [items], line of the item.
        lengths: the run lengths in use, 13 and those of shorter items.
        run_hash, run_item: uint64 and int32 [runs], sorted by hash, one item each.
        part_hash, part_item: uint64 and int32 [parts], sorted by hash, up to ten items each.
        parts: int32 [items], different 3-grams of an item; 0 where it has too few.
        skipped: items with fewer than five words, which are not looked for.
    """

    names: tuple[str, ...]
    set_of: np.ndarray
    lines: np.ndarray
    lengths: tuple[int, ...]
    run_hash: np.ndarray
    run_item: np.ndarray
    part_hash: np.ndarray
    part_item: np.ndarray
    parts: np.ndarray
    skipped: int

    def where(self, item: int) -> str:
        """Returns the name of the set and the line of an item."""
        return f"{self.names[self.set_of[item]]}, line {self.lines[item]}"


def build(evaluations: Sequence[Evaluation], spool: Path) -> Index:
    """Reads evaluation sets.

    Raises:
        RequestError: a set cannot be read, or has no words in the field.
    """
    texts: list[str] = []
    set_of: list[int] = []
    lines: list[int] = []
    for number, evaluation in enumerate(evaluations):
        directory = spool / f"against{number}"
        directory.mkdir()
        rows = open_rows(evaluation.source, directory, "--against")
        before = len(texts)
        for span in rows.spans():
            for row, record in rows.read(span):
                if isinstance(record, Fault):
                    raise RequestError(record.message, key="--against", where=rows.where(row))
                text = _question(record, evaluation.field, rows.where(row))
                if text:
                    texts.append(text)
                    set_of.append(number)
                    lines.append(rows.line(row))
        if len(texts) == before:
            raise RequestError("no item has words", key="--against", where=evaluation.source)
    return _indexed([e.name for e in evaluations], texts, set_of, lines)


def _question(record: dict, field: str | None, where: str) -> str:
    if field is None:
        chosen = [record[f] for f in _QUESTIONS if isinstance(record.get(f), str)]
        found = " ".join(chosen) if chosen else " ".join(strings(record))
    elif field not in record:
        near = nearest(field, [str(f) for f in record])
        raise RequestError(f"no field {field!r}{near}", key="--against", where=where)
    else:
        found = " ".join(strings(record[field]))
    words = words_only(found).split(" ")
    while len(words) > 1 and words[0] in _FORM:
        del words[0]
    while len(words) > 1 and words[-1] in _FORM:
        del words[-1]
    return " ".join(words)


def _indexed(names: list[str], texts: list[str], set_of: list[int], lines: list[int]) -> Index:
    words = Words(texts)
    counts = words.counts
    lengths = sorted({RUN} | {int(c) for c in np.unique(counts) if SHORTEST <= c < RUN})
    hashes, items = [], []
    for n in lengths:
        found, text = words.grams(n)
        whole = np.ones(len(found), bool) if n == RUN else counts[text] == n
        hashes.append(found[whole])
        items.append(text[whole])
    run_hash, run_item = _sorted(np.concatenate(hashes), np.concatenate(items))
    first = np.flatnonzero(np.diff(run_hash, prepend=run_hash[:1] ^ np.uint64(1)) != 0)
    part_hash, part_item = _sorted(*words.grams(PART))
    parts = np.bincount(part_item, minlength=len(texts)).astype(np.int32)
    parts[parts < LEAST_PARTS] = 0
    return Index(
        names=tuple(names),
        set_of=np.array(set_of, np.int32),
        lines=np.array(lines, np.int64),
        lengths=tuple(lengths),
        run_hash=run_hash[first],
        run_item=run_item[first].astype(np.int32),
        part_hash=part_hash,
        part_item=part_item.astype(np.int32),
        parts=parts,
        skipped=int(np.count_nonzero(counts < SHORTEST)),
    )


def _sorted(hashes: np.ndarray, items: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sorts (hash, item), each once, without the hashes that too many items share."""
    order = np.lexsort((items, hashes))
    hashes, items = hashes[order], items[order]
    if not len(hashes):
        return hashes, items
    new = np.ones(len(hashes), bool)
    new[1:] = (hashes[1:] != hashes[:-1]) | (items[1:] != items[:-1])
    hashes, items = hashes[new], items[new]
    _, count = np.unique(hashes, return_counts=True)
    rare = np.repeat(count <= _SHARED_BY, count)
    return hashes[rare], items[rare]


def search(index: Index, texts: Sequence[str]) -> list[Hit]:
    """Looks for items in texts, as `words_only` gives them: at most one hit of each kind a text."""
    words = Words(texts)
    hits = _runs(index, words)
    found = {hit.text for hit in hits}
    return hits + [hit for hit in _contained(index, words) if hit.text not in found]


def _runs(index: Index, words: Words) -> list[Hit]:
    best: dict[int, Hit] = {}
    for n in index.lengths:
        hashes, text = words.grams(n)
        at = np.searchsorted(index.run_hash, hashes)
        at[at == len(index.run_hash)] = 0
        same = index.run_hash[at] == hashes if len(index.run_hash) else np.zeros(len(at), bool)
        for number, item in zip(
            text[same].tolist(), index.run_item[at[same]].tolist(), strict=True
        ):
            best.setdefault(number, Hit("contamination", number, item, n))
    return list(best.values())


def _contained(index: Index, words: Words) -> list[Hit]:
    hashes, text = words.grams(PART)
    if not len(hashes) or not len(index.part_hash):
        return []
    key = np.unique(np.stack([text.astype(np.uint64), hashes]), axis=1)
    text, hashes = key[0].astype(np.int64), key[1]
    left = np.searchsorted(index.part_hash, hashes, side="left")
    count = np.searchsorted(index.part_hash, hashes, side="right") - left
    text = np.repeat(text, count)
    at = np.repeat(left - np.concatenate([[0], np.cumsum(count)[:-1]]), count)
    item = index.part_item[at + np.arange(len(at))]
    pairs, shared = np.unique(text * len(index.parts) + item, return_counts=True)
    text, item = np.divmod(pairs, len(index.parts))
    size = index.parts[item]
    share = np.divide(shared, size, out=np.zeros(len(pairs)), where=size > 0)
    best: dict[int, Hit] = {}
    for at in np.flatnonzero(share >= CONTAINED):
        number, value = int(text[at]), float(share[at])
        if number not in best or value > best[number].share:
            best[number] = Hit("near_contamination", number, int(item[at]), value)
    return list(best.values())
