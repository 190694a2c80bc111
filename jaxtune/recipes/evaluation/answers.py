"""What a model writes to questions, compared with the answers wanted."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from jaxtune.core.errors import RequestError
from jaxtune.data.questions import Question
from jaxtune.evaluate.bootstrap import Measured, interval, paired
from jaxtune.evaluate.continuations import positions
from jaxtune.generate import stops
from jaxtune.recipes.language_model import LanguageModel


@dataclasses.dataclass(frozen=True)
class Writing:
    """How answers are written; see `LanguageModel.generate`.

    Attributes:
        max_new_tokens: the most tokens of an answer; what the model has no positions for is left
            out.
        temperature, top_p, top_k, seed: of the choice of a token; temperature 0 is greedy.
        stop: texts before which an answer ends.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    stop: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Written:
    """Answers to questions.

    Attributes:
        texts: one a question.
        cut: bool [N], those that were still going on at their last token.
    """

    texts: tuple[str, ...]
    cut: np.ndarray


def write(
    lm: LanguageModel, questions: Sequence[Question], writing: Writing, batch_size: int
) -> Written:
    """Returns the model's answers.

    An answer does not depend on the other questions, nor, where nothing is drawn, on their order.

    Args:
        lm: the model.
        questions: with ids of the model's tokenizer.
        writing: how.
        batch_size: questions at a time.

    Raises:
        RequestError: a prompt that leaves no position for an answer, with its line.
    """
    most = positions(lm.config, lm.method)
    groups: dict[int, list[int]] = {}
    for number, question in enumerate(questions):
        room = most - len(question.ids)
        if room < 1:
            raise RequestError(
                f"the prompt has {len(question.ids)} tokens and leaves no room for an answer: the "
                f"model reads {most}",
                where=question.where,
            )
        # Few lengths, so that few programs are compiled.
        length = writing.max_new_tokens
        length = length if room >= length else 1 << (room.bit_length() - 1)
        groups.setdefault(length, []).append(number)
    texts, cut = [""] * len(questions), np.zeros(len(questions), bool)
    given = dataclasses.asdict(writing) | {"stop": list(writing.stop) or None}
    for length, numbers in groups.items():
        numbers = sorted(numbers, key=lambda n: -len(questions[n].ids))
        prompts = [list(questions[n].ids) for n in numbers]
        settings = given | {"max_new_tokens": length, "batch_size": batch_size}
        for number, new in zip(numbers, lm.generate(prompts, **settings), strict=True):
            text = lm.continuation(questions[number].ids, new)
            texts[number] = stops.cut(text, writing.stop)
            cut[number] = len(new) >= length
    return Written(tuple(texts), cut)


def told(figures: Mapping[str, Measured]) -> dict[str, dict[str, float]]:
    """Returns {name: {"value", "low", "high"}}, with the ends of the 95 % interval."""
    return {name: interval(figure)._asdict() for name, figure in figures.items()}


def compared(
    ours: Mapping[str, Measured], theirs: Mapping[str, Measured]
) -> dict[str, dict[str, float]]:
    """Returns {name: {"value", "rise", "low", "high"}}.

    "value" is the other model's, "rise" ours − theirs, with the ends of its interval by paired
    bootstrap over the examples.
    """
    found = {}
    for name, figure in theirs.items():
        rise, low, high = paired(ours[name], figure)
        found[name] = {"value": figure.whole, "rise": rise, "low": low, "high": high}
    return found
