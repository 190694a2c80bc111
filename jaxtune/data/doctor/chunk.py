"""What was found in one span of rows, as one process gives it."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from jaxtune.data.doctor.groups import Named
from jaxtune.data.doctor.kinds import BIT
from jaxtune.data.doctor.rows import Span
from jaxtune.data.doctor.tally import Tally


@dataclass(frozen=True)
class Shown:
    """A row shown in the report: what was found in it, and the words around, masked."""

    row: int
    detail: str
    text: str

    def moved(self, by: int) -> Shown:
        """Returns it with another row number, such as that among all inputs."""
        return Shown(self.row + by, self.detail, self.text)


@dataclass
class Chunk:
    """Findings in a span; arrays are [rows of the span].

    Attributes:
        input: number of the input.
        first: number of the first row in its input.
        flags: uint64, a bit for each kind.
        exact, prompt, answer: uint64 hashes of all words, of the prompt and of the answer; 0
            where there is none.
        bands, low: of `minhash.signatures`; `signed` says for which rows.
        characters, tokens, targets: int32 lengths; tokens is -1 where unknown.
        languages: {row of the span: language}.
        answers: to prompts that name one group.
        items: {kind: (row of the span, item of an evaluation set)}.
        examples: {kind: shown rows}.
        samples: words of some of the rows; see `topics.sampled`.
        tally: counts.
    """

    input: int
    first: int
    flags: np.ndarray
    exact: np.ndarray
    prompt: np.ndarray
    answer: np.ndarray
    characters: np.ndarray
    tokens: np.ndarray
    targets: np.ndarray
    bands: np.ndarray | None = None
    low: np.ndarray | None = None
    signed: np.ndarray | None = None
    languages: dict[int, str] = field(default_factory=dict)
    answers: list[Named] = field(default_factory=list)
    items: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    examples: dict[str, list[Shown]] = field(default_factory=dict)
    samples: list[frozenset[str]] = field(default_factory=list)
    tally: Tally = field(default_factory=Tally)

    def flag(self, kind: str, at: int, detail: str, most: int, text: str = "") -> None:
        """Notes that the row `at` of the span is of a kind; keeps the first few to show."""
        self.flags[at] |= np.uint64(BIT[kind])
        shown = self.examples.setdefault(kind, [])
        if len(shown) < most:
            shown.append(Shown(self.first + at, detail, text))


def new_chunk(number: int, span: Span) -> Chunk:
    """Returns a chunk without findings."""
    size = span.count

    def zeros(dtype: type) -> np.ndarray:
        return np.zeros(size, dtype)

    return Chunk(
        number, span.first, zeros(np.uint64), zeros(np.uint64), zeros(np.uint64),
        zeros(np.uint64), zeros(np.int32), np.full(size, -1, np.int32), zeros(np.int32),
    )  # fmt: skip
