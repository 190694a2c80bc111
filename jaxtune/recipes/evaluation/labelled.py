"""Which label a model finds likeliest behind each prompt."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jaxtune.core.errors import RequestError, nearest
from jaxtune.data.questions import Question, with_label
from jaxtune.evaluate.continuations import Request, positions, score
from jaxtune.recipes.language_model import LanguageModel

AUTO = "auto"  # the labels are the distinct completions
MOST = 200  # labels


def labels_of(asked: Sequence[str], questions: Sequence[Question], key: str) -> tuple[str, ...]:
    """Returns the labels, without the white space around them.

    Args:
        asked: names, or AUTO alone for the distinct answers of the questions, sorted.
        questions: whose answers are labels.
        key: named in errors.

    Raises:
        RequestError: fewer than two labels, or too many, or an answer that is none of them.
    """
    wanted = {question.wanted.strip() for question in questions}
    labels = tuple(sorted(wanted)) if tuple(asked) == (AUTO,) else tuple(dict.fromkeys(asked))
    if len(labels) < 2:
        raise RequestError(
            f"expected two labels or more; got {', '.join(labels) or 'none'}", key=key
        )
    if len(labels) > MOST:
        raise RequestError(
            f"{len(labels)} distinct completions are more than {MOST} labels; name the labels, or "
            "compare what the model writes (metrics)",
            key=key,
        )
    for question in questions if not wanted <= set(labels) else ():
        own = question.wanted.strip()
        if own not in labels:
            raise RequestError(
                f"the completion {own[:60]!r} is none of the labels{nearest(own, labels)}",
                key=key,
                where=question.where,
            )
    return labels


def truth_of(questions: Sequence[Question], labels: Sequence[str]) -> np.ndarray:
    """Returns the number of each question's label, int [N]."""
    place = {label: number for number, label in enumerate(labels)}
    return np.array([place[question.wanted.strip()] for question in questions], np.int64)


def label_scores(
    lm: LanguageModel,
    questions: Sequence[Question],
    labels: Sequence[str],
    rows: int | None = None,
) -> np.ndarray:
    """Returns ln p(label | prompt), float64 [N, L], the token that ends a completion included.

    Args:
        lm: the model.
        questions: the prompts; a label has the white space of the record's own completion.
        labels: as of `labels_of`.
        rows: prompts at a time; does not change the result.

    Raises:
        RequestError: a prompt that is too long with a label, with its line.
    """
    most, asked = positions(lm.config, lm.method) + 1, []  # the last token is never read
    for question in questions:
        for label in labels:
            text = with_label(question, label)
            context, continuation = question.answered(text, lm.tokenizer)
            if len(context) + len(continuation) > most:
                raise RequestError(
                    f"prompt and label have {len(context) + len(continuation)} tokens; the model "
                    f"reads {most}",
                    where=question.where,
                )
            asked.append(Request(context, continuation))
    found = score(lm.config, lm.method, lm.params, lm.mesh, asked, rows=rows)
    logprobs = np.array([one.logprob for one in found], np.float64)
    return logprobs.reshape(len(questions), len(labels))
