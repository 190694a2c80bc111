"""Tasks whose accuracy a run should keep: labels to choose from, or answers to match."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxtune.data.questions import Question
from jaxtune.data.tokenizer import Tokenizer
from jaxtune.evaluate.bootstrap import mean_of, paired
from jaxtune.evaluate.text_metrics import exact_match
from jaxtune.recipes.evaluation.answers import Writing, write
from jaxtune.recipes.evaluation.data import Entry, questions_of
from jaxtune.recipes.evaluation.labelled import label_scores, labels_of, truth_of
from jaxtune.recipes.language_model import LanguageModel

ACCURACY, DROP = "accuracy", "accuracy_drop"
Hits = dict[str, np.ndarray]  # {task: float64 [examples], 1 where the model is right}


@dataclasses.dataclass(frozen=True)
class Task:
    """A task.

    Attributes:
        questions: with the answers wanted.
        labels: to choose from by likelihood; none: what the model writes is to be the answer.
    """

    questions: tuple[Question, ...]
    labels: tuple[str, ...]

    def hits(self, lm: LanguageModel, max_new_tokens: int, batch_size: int) -> np.ndarray:
        """Returns float64 [examples], 1 where the model is right.

        Args:
            lm: the model.
            max_new_tokens: of an answer.
            batch_size: questions at a time; does not change the result.
        """
        if self.labels:
            chosen = label_scores(lm, self.questions, self.labels, batch_size).argmax(axis=1)
            return (chosen == truth_of(self.questions, self.labels)).astype(np.float64)
        written = write(lm, self.questions, Writing(max_new_tokens), batch_size)
        wanted = [question.wanted for question in self.questions]
        return exact_match(written.texts, wanted)["exact_match"].sums[:, 0]

    def fingerprint(self) -> str:
        """Returns a hash of what is asked, and of what is right."""
        told = [self.labels, *((q.ids, q.wanted) for q in self.questions)]
        return hashlib.blake2b(json.dumps(told).encode(), digest_size=16).hexdigest()


def open_tasks(config: Any, tokenizer: Tokenizer | None, num_virtual: int) -> dict[str, Task]:
    """Returns the tasks of `retention.tasks` by name.

    Raises:
        RequestError: a record without an answer, or one that is none of the labels.
    """
    found = {}
    for i, entry in enumerate(config.retention.tasks):
        key = f"retention.tasks[{i}]"
        source = Entry(
            entry.name, entry.source, entry.format, key, config.data.seq_len, config.data.overlong
        )
        questions = questions_of(source, tokenizer, num_virtual)
        labels = labels_of(entry.labels, questions, f"{key}.labels") if entry.labels else ()
        found[entry.name] = Task(tuple(questions), labels)
    return found


def accuracies(hits: Hits) -> dict[str, float]:
    """Returns `retention/accuracy` over all examples, and each task's where there are several.

    >>> accuracies({"a": np.array([1.0, 0.0]), "b": np.array([1.0, 1.0])})["retention/accuracy"]
    0.75
    """
    return {f"retention/{name}{ACCURACY}": float(own.mean()) for name, own in named(hits).items()}


def drops(before: Hits, now: Hits) -> dict[str, float]:
    """Returns by how much each accuracy fell, with the ends of its 95 % interval over all tasks.

    The interval is that of the paired bootstrap: the same examples are drawn before and after.
    """
    found, old = {}, named(before)
    for name, own in named(now).items():
        found[f"retention/{name}{DROP}"] = float(old[name].mean() - own.mean())
    _, low, high = paired(mean_of(old[""]), mean_of(named(now)[""]))
    return found | {f"retention/{DROP}/low": low, f"retention/{DROP}/high": high}


def named(hits: Mapping[str, np.ndarray]) -> Hits:
    """Returns the hits of all tasks under "", and of each of several under `NAME/`."""
    each = {f"{name}/": own for name, own in hits.items()} if len(hits) > 1 else {}
    return {"": np.concatenate([*hits.values()])} | each
