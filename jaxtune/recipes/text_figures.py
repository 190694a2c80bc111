"""What of a model is measured in texts: what it writes, and the labels that it chooses."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxtune.evaluate import labels as classification
from jaxtune.evaluate import text_metrics
from jaxtune.evaluate.bootstrap import Measured
from jaxtune.recipes import labelled
from jaxtune.recipes.answers import Writing, compared, told, write
from jaxtune.recipes.eval_data import Entry, questions_of
from jaxtune.recipes.language_model import LanguageModel


@dataclasses.dataclass(frozen=True)
class Asked:
    """What is to be measured.

    Attributes:
        metrics: names in `text_metrics.METRICS`; none: nothing is written.
        labels: names of labels, or ("auto",); none: nothing is classified.
        writing: how answers are written.
    """

    metrics: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    writing: Writing = dataclasses.field(default_factory=Writing)


@dataclasses.dataclass(frozen=True)
class Found:
    """What was measured on the questions of some sources, in their order.

    Attributes:
        sources: the name of each question's source.
        wanted: the answer of each.
        metrics: names, as asked.
        texts: the model's answers; None: none were asked for.
        cut: bool [N], answers that were still going on at their last token.
        names: the labels; none: nothing was classified.
        logprobs: float64 [N, L], ln p(label | prompt).
        truth: int [N], the right label.
    """

    sources: tuple[str, ...]
    wanted: tuple[str, ...]
    metrics: tuple[str, ...] = ()
    texts: tuple[str, ...] | None = None
    cut: np.ndarray | None = None
    names: tuple[str, ...] = ()
    logprobs: np.ndarray | None = None
    truth: np.ndarray | None = None

    def part(self, source: str) -> Found:
        """Returns what was measured on one source."""
        chosen = [n for n, name in enumerate(self.sources) if name == source]

        def taken(values: Any) -> Any:
            if isinstance(values, np.ndarray):
                return values[chosen]
            return None if values is None else tuple(values[n] for n in chosen)

        fields = ("sources", "wanted", "texts", "cut", "logprobs", "truth")
        return dataclasses.replace(self, **{name: taken(getattr(self, name)) for name in fields})

    def figures(self) -> dict[str, dict[str, Measured]]:
        """Returns the figures, {"metrics", "labels": {name: figure}} as far as they were asked."""
        found = {}
        if self.texts is not None:
            found["metrics"] = text_metrics.measure(self.metrics, self.texts, self.wanted)
        if self.logprobs is not None:
            found["labels"] = classification.figures(self.logprobs, self.truth)
        return found

    def report(self, source: str | None = None) -> dict[str, Any]:
        """Returns the figures with their intervals, of one source or of all.

        "metrics" and "labels" are {name: {"value", "low", "high"}}; "answers" counts them and those
        that were cut; "labels" also has "names", "by_label" and "confusion", whose row is the
        right label and whose column the one chosen.
        """
        part = self if source is None else self.part(source)
        found: dict[str, Any] = {name: told(of) for name, of in part.figures().items()}
        if part.cut is not None:
            found["answers"] = {"written": len(part.cut), "cut": int(part.cut.sum())}
        if part.logprobs is not None:
            counts = classification.confusion(part.logprobs, part.truth)
            found["labels"] |= {
                "names": list(part.names),
                "by_label": classification.by_label(counts, part.names),
                "confusion": counts.tolist(),
            }
        return found

    def compared(self, other: Found) -> dict[str, Any]:
        """Returns {"metrics", "labels"} of another model on the same questions; see `compared`."""
        theirs = other.figures()
        return {name: compared(ours, theirs[name]) for name, ours in self.figures().items()}


def texts_asked(
    metrics: Sequence[str] | None, labels: Sequence[str] | None, writing: Mapping[str, Any]
) -> Asked | None:
    """Returns what was asked for, or None.

    Raises:
        RequestError: an unknown metric, or one whose package is not installed.
    """
    if metrics is None and labels is None:
        return None
    names = () if metrics is None else text_metrics.check_names(metrics, "--metrics")
    return Asked(names, tuple(labels or ()), Writing(**writing))


def measure_texts(
    lm: LanguageModel,
    entries: Sequence[Entry],
    asked: Asked,
    batch_size: int,
    limit: int | None = None,
    names: Sequence[str] = (),
) -> Found:
    """Returns what a model writes to the questions of sources, and which labels it finds likely.

    Args:
        lm: the model.
        entries: the sources.
        asked: what is to be measured.
        batch_size: questions at a time; does not change the result.
        limit: the first so many of each source.
        names: the labels, where they are known already.

    Raises:
        RequestError: a source without answers, one that is no label, or a prompt that is too long.
    """
    each = {entry.name: questions_of(lm, entry, limit) for entry in entries}
    questions = [question for some in each.values() for question in some]
    found = Found(
        tuple(name for name, some in each.items() for _ in some),
        tuple(question.wanted for question in questions),
        asked.metrics,
    )
    if asked.labels:
        names = labelled.labels_of(names or asked.labels, questions, "--labels")
        found = dataclasses.replace(
            found,
            names=tuple(names),
            logprobs=labelled.label_scores(lm, questions, names, batch_size),
            truth=labelled.truth_of(questions, names),
        )
    if asked.metrics:
        written = write(lm, questions, asked.writing, batch_size)
        found = dataclasses.replace(found, texts=written.texts, cut=written.cut)
    return found
