"""Everything that the doctor finds in the data of a request."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxtune.core.errors import RequestError
from jaxtune.data.doctor import contamination, duplicates, minhash
from jaxtune.data.doctor.chunk import Chunk, Shown
from jaxtune.data.doctor.examine import Context, excerpt
from jaxtune.data.doctor.groups import Answers
from jaxtune.data.doctor.kinds import BIT
from jaxtune.data.doctor.language import UNKNOWN
from jaxtune.data.doctor.progress import advancing
from jaxtune.data.doctor.rows import Rows, open_rows
from jaxtune.data.doctor.settings import Settings
from jaxtune.data.doctor.tally import Tally
from jaxtune.data.doctor.view import loose_view
from jaxtune.data.doctor.workers import Map, compare, look, make_context, working
from jaxtune.data.formats import check_format

# A language is the common one if so large a share of the rows that show one are in it.
_COMMON = 0.8
# A process takes seconds to begin, in which another looks at some thousand rows.
_ROWS_A_PROCESS = 3000


@dataclass
class Diagnosis:
    """What was found; arrays are [rows of all inputs], one input after the other.

    Attributes:
        settings: the request.
        rows: of each input; readable as long as the spool is there.
        starts: int64 [inputs + 1], first row of each input.
        flags: uint64, a bit for each kind.
        characters, tokens, targets: int32 lengths; tokens is -1 where unknown.
        partner: {kind: {row: row that it repeats or contradicts}}.
        items: {kind: {row: item of an evaluation set that it holds}}.
        examples: {kind: [(row, detail, text)]}, the first few.
        spared: rows that are near duplicates of rows that are removed themselves, so that they
            may stay.
        tally: counts over all rows.
        samples: words of some of the rows; see `topics.sampled`.
        answers: answers to prompts that name groups.
        index: of the evaluation sets, or None.
        common_language: what most rows are in, or None.
        seconds: of each part of the work.
    """

    settings: Settings
    rows: tuple[Rows, ...]
    starts: np.ndarray
    flags: np.ndarray
    characters: np.ndarray
    tokens: np.ndarray
    targets: np.ndarray
    partner: dict[str, duplicates.Same]
    items: dict[str, dict[int, int]]
    examples: dict[str, list[Shown]]
    spared: np.ndarray
    tally: Tally
    samples: list[frozenset[str]]
    answers: Answers
    index: contamination.Index | None
    common_language: str | None
    seconds: dict[str, float]

    def input_of(self, row: int) -> int:
        """Returns the number of the input that holds a row."""
        return int(np.searchsorted(self.starts, row, side="right")) - 1

    def where(self, row: int) -> str:
        """Returns the place of a row, as `FILE:LINE`."""
        number = self.input_of(row)
        return self.rows[number].where(row - int(self.starts[number]))

    def having(self, kind: str) -> np.ndarray:
        """Returns int64 rows of a kind, ascending."""
        return np.flatnonzero(self.flags & np.uint64(BIT[kind]))


def diagnose(settings: Settings, spool: Path, console: Any = None) -> Diagnosis:
    """Looks at all rows of all inputs.

    Args:
        settings: the request.
        spool: an empty directory for what does not stay in memory; it must outlive the result.
        console: a `rich.console.Console` for progress, or None.

    Raises:
        RequestError: a source, evaluation set or tokenizer cannot be opened, or a format is
            unknown. What is wrong with single rows is no error but a finding.
    """
    seconds: dict[str, float] = {}
    began = time.monotonic()
    for item in settings.inputs:
        check_format(item.format, item.key)
    rows = tuple(_open_inputs(settings, spool))
    if settings.workers is None:
        most = 1 + sum(r.size for r in rows) // _ROWS_A_PROCESS
        settings = dataclasses.replace(settings, workers=min(os.cpu_count() or 1, most))
    index = contamination.build(settings.evaluations, spool) if settings.evaluations else None
    context = make_context(settings, rows, index)
    began = _lap(seconds, "opening", began)
    gathered = _Gathered(settings, rows, spool)
    with working(context) as each:
        tasks = [(number, span) for number, r in enumerate(rows) for span in r.spans()]
        with advancing(console, "looking at rows", sum(r.size for r in rows)) as advance:
            for chunk in each(look, tasks):
                gathered.add(chunk)
                advance(len(chunk.flags))
        began = _lap(seconds, "rows", began)
        found = gathered.diagnosis(context, seconds)
        _find_repeats(found, gathered, each, console)
        _show_languages(found, gathered)
        _lap(seconds, "repeats", began)
    return found


def _lap(seconds: dict[str, float], part: str, began: float) -> float:
    now = time.monotonic()
    seconds[part] = round(now - began, 3)
    return now


def _open_inputs(settings: Settings, spool: Path) -> Iterator[Rows]:
    for number, item in enumerate(settings.inputs):
        directory = spool / f"input{number}"
        directory.mkdir()
        yield open_rows(item.source, directory, item.key)


class _Gathered:
    """Puts the parts of chunks in their places; signatures lie on disk."""

    def __init__(self, settings: Settings, rows: tuple[Rows, ...], spool: Path):
        self.settings, self.rows = settings, rows
        self.starts = np.concatenate([[0], np.cumsum([r.size for r in rows])]).astype(np.int64)
        total = int(self.starts[-1])
        self.flags = np.zeros(total, np.uint64)
        self.hashes = {name: np.zeros(total, np.uint64) for name in ("exact", "prompt", "answer")}
        self.lengths = {
            name: np.zeros(total, np.int32) for name in ("characters", "tokens", "targets")
        }
        self.bands = _on_disk(
            spool / "bands.npy",
            np.uint32,
            (total, minhash.SIZE // minhash.rows_a_band(settings.near)),
        )
        self.low = _on_disk(spool / "low.npy", np.uint8, (total, minhash.SIZE))
        self.signed = np.zeros(total, bool)
        self.language = np.zeros(total, np.uint8)
        self.codes: dict[str, int] = {UNKNOWN: 0}
        self.examples: dict[str, list[Shown]] = {}
        self.tally = Tally()
        self.samples: list[frozenset[str]] = []
        self.answers = Answers()
        self.items: dict[str, dict[int, int]] = {}

    def add(self, chunk: Chunk) -> None:
        start = int(self.starts[chunk.input]) + chunk.first
        part = slice(start, start + len(chunk.flags))
        self.flags[part] = chunk.flags
        for name, hashes in self.hashes.items():
            hashes[part] = getattr(chunk, name)
        for name, lengths in self.lengths.items():
            lengths[part] = getattr(chunk, name)
        self.bands[part], self.low[part] = chunk.bands, chunk.low
        self.signed[part] = chunk.signed
        for at, code in chunk.languages.items():
            self.language[start + at] = self.codes.setdefault(code, len(self.codes) % 256)
        for kind, shown in chunk.examples.items():
            kept = self.examples.setdefault(kind, [])
            base = int(self.starts[chunk.input])
            for one in shown[: self.settings.kept_examples - len(kept)]:
                kept.append(one.moved(base))
        self.tally.add(chunk.tally)
        self.samples += chunk.samples
        self.answers.add(chunk.answers)
        for kind, found in chunk.items.items():
            self.items.setdefault(kind, {}).update((start + at, item) for at, item in found)

    def diagnosis(self, context: Context, seconds: dict[str, float]) -> Diagnosis:
        common = self._common_language()
        if common is not None:
            other = (self.language != 0) & (self.language != self.codes[common])
            self.flags[other] |= np.uint64(BIT["other_language"])
        return Diagnosis(
            settings=self.settings,
            rows=self.rows,
            starts=self.starts,
            flags=self.flags,
            **self.lengths,
            partner={},
            items=self.items,
            examples=self.examples,
            spared=np.zeros(0, np.int64),
            tally=self.tally,
            samples=self.samples,
            answers=self.answers,
            index=context.index,
            common_language=common,
            seconds=seconds,
        )

    def _common_language(self) -> str | None:
        counts = {code: n for code, n in self.tally.languages.items() if code != UNKNOWN}
        if not counts:
            return None
        best = max(counts, key=counts.__getitem__)
        return best if counts[best] >= _COMMON * sum(counts.values()) else None


def _show_languages(found: Diagnosis, gathered: _Gathered) -> None:
    names = {number: code for code, number in gathered.codes.items()}
    rows = found.having("other_language")[: found.settings.kept_examples].tolist()
    found.examples["other_language"] = [
        Shown(row, names[int(gathered.language[row])], _words(found, row)) for row in rows
    ]


def _on_disk(path: Path, dtype: type, shape: tuple[int, int]) -> np.ndarray:
    return np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)


def _find_repeats(found: Diagnosis, gathered: _Gathered, each: Map, console: Any) -> None:
    """Finds what no single row shows: repeats, leaks between splits, answers that differ."""
    names = list(dict.fromkeys(item.split for item in found.settings.inputs))
    of_input = np.array([names.index(item.split) for item in found.settings.inputs])
    split = np.repeat(of_input, [r.size for r in found.rows])
    repeats, leaks, firsts = duplicates.exact(gathered.hashes["exact"], split)
    _mark(found, "duplicate", repeats, "as")
    _mark(found, "split_leak", leaks, "as")
    comparable = firsts[gathered.signed[firsts]]
    near = found.settings.near
    pairs = duplicates.candidates(gathered.bands, gathered.low, comparable, near)
    kept = _verified(found, pairs, each, console)
    repeats, leaks, redundant = duplicates.near(kept, split)
    _mark(found, "near_duplicate", repeats, "nearly as")
    _mark(found, "near_split_leak", leaks, "nearly as")
    found.spared = np.setdiff1d(repeats.rows, redundant)
    clash = duplicates.conflicts(gathered.hashes["prompt"], gathered.hashes["answer"])
    _mark(found, "conflict", clash, "another answer than")


def _verified(found: Diagnosis, pairs: np.ndarray, each: Map, console: Any) -> duplicates.Pairs:
    """Keeps the pairs that are similar by their words, not by their signatures."""
    blocks = list(duplicates.blocks(pairs))
    tasks = []
    for rows, places in blocks:
        inputs = np.searchsorted(found.starts, rows, side="right") - 1
        spans = [
            (int(i), found.rows[i].span_of(int(row - found.starts[i])))
            for i, row in zip(inputs, rows, strict=True)
        ]
        tasks.append((spans, places.tolist()))
    similarity: list[float] = []
    with advancing(console, "comparing pairs", len(pairs)) as advance:
        for part in each(compare, tasks):
            similarity += part
            advance(len(part))
    # In the order in which the pairs came: blocks are slices of them.
    values = np.array(similarity, np.float64)
    near = values >= found.settings.near
    return duplicates.Pairs(pairs[near, 0], pairs[near, 1], values[near])


def _mark(found: Diagnosis, kind: str, same: duplicates.Same, words: str) -> None:
    if not len(same.rows):
        return
    order = np.argsort(same.rows, kind="stable")
    same = duplicates.Same(same.rows[order], same.of[order])
    found.flags[same.rows] |= np.uint64(BIT[kind])
    found.partner[kind] = same
    most = found.settings.kept_examples
    for row, other in zip(same.rows[:most].tolist(), same.of[:most].tolist(), strict=True):
        detail = f"{words} {found.where(other)}"
        found.examples.setdefault(kind, []).append(Shown(row, detail, _words(found, row)))


def _words(found: Diagnosis, row: int) -> str:
    number = found.input_of(row)
    rows = found.rows[number]
    ((_, record),) = rows.read(rows.span_of(row - int(found.starts[number])))
    if not isinstance(record, dict):
        raise RequestError("changed while it was read", where=found.where(row))
    return excerpt(loose_view(record).prompt, 0, 0)
