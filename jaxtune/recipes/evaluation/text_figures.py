"""What of a model is measured in texts: what it writes, and the labels that it chooses."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxtune.data.questions import Question
from jaxtune.evaluate import labels as classification
from jaxtune.evaluate import text_metrics
from jaxtune.evaluate.bootstrap import Measured
from jaxtune.recipes.evaluation import labelled
from jaxtune.recipes.evaluation.answers import Writing, compared, told, write
from jaxtune.recipes.evaluation.judge import Judge
from jaxtune.recipes.language_model import LanguageModel


@dataclasses.dataclass(frozen=True)
class Asked:
    """What is to be measured.

    Attributes:
        metrics: names in `text_metrics.METRICS`; with none, and no judge, nothing is written.
        labels: names of labels, or ("auto",); none: nothing is classified.
        writing: how answers are written.
        judge: of what is written, or None.
    """

    metrics: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    writing: Writing = dataclasses.field(default_factory=Writing)
    judge: Judge | None = None


@dataclasses.dataclass(frozen=True)
class Found:
    """What was measured on the questions of some sources, in their order.

    Attributes:
        groups: (source, value of the field that parts it) of each question.
        wanted: the answer of each.
        metrics: names, as asked.
        texts: the model's answers; None: none were asked for.
        cut: bool [N], answers that were still going on at their last token.
        names: the labels; none: nothing was classified.
        logprobs: float64 [N, L], ln p(label | prompt).
        truth: int [N], the right label.
    """

    groups: tuple[tuple[str, str], ...]
    wanted: tuple[str, ...]
    metrics: tuple[str, ...] = ()
    texts: tuple[str, ...] | None = None
    cut: np.ndarray | None = None
    names: tuple[str, ...] = ()
    logprobs: np.ndarray | None = None
    truth: np.ndarray | None = None

    def part(self, source: str | None = None, value: str | None = None) -> Found:
        """Returns what was measured on one source, on one value of the field, or on both."""
        chosen = [
            n
            for n, (name, group) in enumerate(self.groups)
            if source in (None, name) and value in (None, group)
        ]

        def taken(values: Any) -> Any:
            if isinstance(values, np.ndarray):
                return values[chosen]
            return None if values is None else tuple(values[n] for n in chosen)

        fields = ("groups", "wanted", "texts", "cut", "logprobs", "truth")
        return dataclasses.replace(self, **{name: taken(getattr(self, name)) for name in fields})

    def figures(self) -> dict[str, dict[str, Measured]]:
        """Returns the figures, {"metrics", "labels": {name: figure}} as far as they were asked."""
        found = {}
        if self.metrics:
            found["metrics"] = text_metrics.measure(self.metrics, self.texts, self.wanted)
        if self.logprobs is not None:
            found["labels"] = classification.figures(self.logprobs, self.truth)
        return found

    def report(self) -> dict[str, Any]:
        """Returns the figures with their intervals.

        "metrics" and "labels" are {name: {"value", "low", "high"}}; "answers" counts them and those
        that were cut; "labels" also has "names", "by_label" and "confusion", whose row is the
        right label and whose column the one chosen.
        """
        found: dict[str, Any] = {name: told(of) for name, of in self.figures().items()}
        if self.cut is not None:
            found["answers"] = {"written": len(self.cut), "cut": int(self.cut.sum())}
        if self.logprobs is not None:
            counts = classification.confusion(self.logprobs, self.truth)
            found["labels"] |= {
                "names": list(self.names),
                "by_label": classification.by_label(counts, self.names),
                "confusion": counts.tolist(),
            }
        return found

    def compared(self, other: Found) -> dict[str, Any]:
        """Returns {"metrics", "labels"} of another model on the same questions; see `compared`."""
        theirs = other.figures()
        return {name: compared(ours, theirs[name]) for name, ours in self.figures().items()}


def texts_asked(
    metrics: Sequence[str] | None,
    labels: Sequence[str] | None,
    judge: Judge | None,
    writing: Mapping[str, Any],
) -> Asked | None:
    """Returns what was asked for, or None.

    Raises:
        RequestError: an unknown metric, or one whose package is not installed.
    """
    if metrics is None and labels is None and judge is None:
        return None
    names = () if metrics is None else text_metrics.check_names(metrics, "--metrics")
    return Asked(names, tuple(labels or ()), Writing(**writing), judge)


def measure_texts(
    lm: LanguageModel,
    questions: Mapping[str, Sequence[Question]],
    asked: Asked,
    batch_size: int,
    names: Sequence[str] = (),
) -> Found:
    """Returns what a model writes to questions, and which labels it finds likely behind them.

    Args:
        lm: the model.
        questions: {source: its questions}, in ids of the model's tokenizer.
        asked: what is to be measured.
        batch_size: questions at a time; does not change the result.
        names: the labels, where they are known already.

    Raises:
        RequestError: an answer that is no label, or a prompt that is too long.
    """
    every = [question for some in questions.values() for question in some]
    found = Found(
        tuple((name, question.group) for name, some in questions.items() for question in some),
        tuple(question.wanted for question in every),
        asked.metrics,
    )
    if asked.labels:
        names = tuple(names) or labelled.labels_of(asked.labels, every, "--labels")
        found = dataclasses.replace(
            found,
            names=names,
            logprobs=labelled.label_scores(lm, every, names, batch_size),
            truth=labelled.truth_of(every, names),
        )
    if asked.metrics or asked.judge is not None:
        written = write(lm, every, asked.writing, batch_size)
        found = dataclasses.replace(found, texts=written.texts, cut=written.cut)
    return found
