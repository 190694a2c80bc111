"""What a run writes to its held-out prompts, and which label it chooses, at each evaluation."""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxtune.core.tree import Tree
from jaxtune.data.questions import Question
from jaxtune.evaluate import labels as classification
from jaxtune.evaluate import text_metrics
from jaxtune.recipes.base import Base
from jaxtune.recipes.evaluation.answers import Writing
from jaxtune.recipes.evaluation.data import Entry, questions_of
from jaxtune.recipes.evaluation.labelled import labels_of
from jaxtune.recipes.evaluation.text_figures import Asked, Found, measure_texts
from jaxtune.recipes.live import live_model


@dataclasses.dataclass(frozen=True)
class HeldTexts:
    """The held-out prompts of a run, and what is measured on them.

    Attributes:
        asked: metrics, labels, and how answers are written.
        questions: {source: its questions}.
        labels: the labels; none: nothing is classified.
        tokenizer: of the model.
    """

    asked: Asked
    questions: dict[str, list[Question]]
    labels: tuple[str, ...]
    tokenizer: Any

    def measure(self, plan: Any, trainable: Tree, frozen: Tree) -> dict[str, float]:
        """Returns `eval/METRIC` and `eval/labels/FIGURE` over all sources, and of each part.

        Args:
            plan: of the run.
            trainable, frozen: the parameters.
        """
        lm = live_model(self.tokenizer, plan.parts, plan.mesh, trainable, frozen)
        size = plan.config.eval.batch_size
        found = measure_texts(lm, self.questions, self.asked, size, self.labels)
        each: dict[str, float] = {}
        for source in self.sources():
            each |= rows_of(found.part(*source), "/".join(("eval", *source, "")))
        return each | rows_of(found, "eval/")

    def sources(self) -> list[tuple[str, ...]]:
        """Returns the parts that have metrics of their own: (source,) or (source, value)."""
        found: list[tuple[str, ...]] = []
        for name, some in self.questions.items():
            found += [(name,)] if len(self.questions) > 1 else []
            found += [(name, value) for value in dict.fromkeys(q.group for q in some) if value]
        return found

    def names(self) -> set[str]:
        """Returns the names of the metrics that `measure` gives."""
        own = list(text_metrics.figure_names(self.asked.metrics))
        if self.labels:
            own += [f"labels/{name}" for name in classification.FIGURES]
        return {
            "/".join(("eval", *source, name)) for source in ((), *self.sources()) for name in own
        }


def rows_of(found: Found, before: str) -> dict[str, float]:
    """Returns the figures as a row of metrics names them."""
    figures = found.figures()
    rows = {f"{before}{name}": f.whole for name, f in figures.get("metrics", {}).items()}
    chosen = {f"{before}labels/{name}": f.whole for name, f in figures.get("labels", {}).items()}
    return rows | chosen


def open_texts(config: Any, base: Base, num_virtual: int) -> HeldTexts | None:
    """Returns the HeldTexts of a resolved config; None where it asks for none.

    Raises:
        RequestError: a metric whose package is not installed, a record without an answer, or one
            that is no label.
    """
    settings = config.eval
    if not (settings.metrics or settings.labels):
        return None
    if settings.metrics:
        text_metrics.check_names(settings.metrics, "eval.metrics")
    data = config.data
    questions = {
        entry.name: questions_of(
            Entry(
                entry.name,
                entry.source,
                entry.format,
                f"data.eval[{i}]",
                data.seq_len,
                data.overlong,
                entry.by,
            ),
            base.tokenizer,
            num_virtual,
            settings.answers,
        )
        for i, entry in enumerate(data.eval)
    }
    labels = ()
    if settings.labels:
        every = [question for some in questions.values() for question in some]
        labels = labels_of(settings.labels, every, "eval.labels")
    writing = Writing(settings.max_new_tokens) if settings.metrics else Writing()
    asked = Asked(settings.metrics, labels, writing)
    return HeldTexts(asked, questions, labels, base.tokenizer)
