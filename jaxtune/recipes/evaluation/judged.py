"""Answers judged by another language model.

Two models' answers are compared in both orders, since a judge prefers a place as well as an answer
(Zheng et al. 2023, arXiv:2306.05685); one model's are graded from 1 to 10.
"""

from __future__ import annotations

import concurrent.futures
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxtune.core.errors import RequestError
from jaxtune.data.questions import Question
from jaxtune.evaluate.bootstrap import interval, mean_of
from jaxtune.recipes.evaluation.judge import Judge
from jaxtune.rl.http import ServerError

CONCURRENCY = 16  # requests under way at a time
LEAST, MOST = 1, 10  # grades


def compare(
    judge: Judge, questions: Sequence[Question], ours: Sequence[str], theirs: Sequence[str]
) -> dict[str, Any]:
    """Returns how often a judge prefers our answers, both orders together.

    A question counts 1 where ours is preferred, 1/2 for a tie, 0 where theirs is, the mean of both
    orders; equal answers are a tie unasked. "win_rate" is the mean with the ends of its 95 %
    interval; "wins" and "losses" count the questions with the same winner in both orders, "ties"
    the others; "first" is the share of the decided verdicts for the answer shown first, 1/2 without
    a preference of place; "unjudged" questions had no verdict in one order, and are left out.

    Args:
        judge: of kind COMPARING.
        questions: with their prompts.
        ours, theirs: answers.

    Raises:
        RequestError: the server does not answer, or no verdict can be read.
    """
    asked = [n for n in range(len(questions)) if ours[n].strip() != theirs[n].strip()]
    pairs = [(n, swapped) for n in asked for swapped in (False, True)]

    def fields(pair: tuple[int, bool]) -> dict[str, str]:
        number, swapped = pair
        shown = (ours[number], theirs[number])
        a, b = shown[::-1] if swapped else shown
        return {**_told(questions[number]), "a": a.strip(), "b": b.strip()}

    verdicts = dict(zip(pairs, _all(judge, [*map(fields, pairs)]), strict=True))
    scores, counts = [], {"wins": 0, "ties": 0, "losses": 0, "unjudged": 0}
    first: list[bool] = []
    for number in range(len(questions)):
        if (number, False) not in verdicts:
            scores.append(0.5)
            counts["ties"] += 1
            continue
        straight, swapped = verdicts[number, False], verdicts[number, True]
        if straight is None or swapped is None:
            counts["unjudged"] += 1
            continue
        first += [found == "a" for found in (straight, swapped) if found != "tie"]
        points = {"a": 1.0, "tie": 0.5, "b": 0.0}
        scores.append((points[straight] + 1.0 - points[swapped]) / 2)
        counts[{1.0: "wins", 0.0: "losses"}.get(scores[-1], "ties")] += 1
    figure = interval(mean_of(_some(judge, scores)))._asdict()
    place = float(np.mean(first)) if first else 0.5
    return {"model": judge.model, "win_rate": figure, **counts, "first": place}


def grade(judge: Judge, questions: Sequence[Question], answers: Sequence[str]) -> dict[str, Any]:
    """Returns {"grade": the mean with the ends of its 95 % interval, "grades": counts, "unjudged"}.

    Args:
        judge: of kind GRADING.
        questions: with their prompts and the answers wanted.
        answers: what is graded.

    Raises:
        RequestError: the server does not answer, or no verdict can be read.
    """
    pairs = zip(questions, answers, strict=True)
    found = _all(judge, [{**_told(q), "answer": text.strip()} for q, text in pairs])
    grades = [int(one) for one in found if one is not None]
    figure = interval(mean_of(_some(judge, grades)))._asdict()
    counts = {str(value): grades.count(value) for value in range(LEAST, MOST + 1)}
    unjudged = len(found) - len(grades)
    return {"model": judge.model, "grade": figure, "grades": counts, "unjudged": unjudged}


def _told(question: Question) -> dict[str, str]:
    return {"prompt": question.prompt, "wanted": question.wanted.strip()}


def _some(judge: Judge, values: Sequence[float]) -> np.ndarray:
    if not values:
        raise RequestError(
            f"no reply of {judge.model!r} has a line '{judge.kind.word}: …' that can be read",
            key="--judge",
        )
    return np.array(values, np.float64)


def _all(judge: Judge, asked: Sequence[Mapping[str, str]]) -> list[str | None]:
    try:
        with concurrent.futures.ThreadPoolExecutor(CONCURRENCY) as pool:
            return list(pool.map(judge.ask, asked))
    except ServerError as error:
        raise RequestError(str(error), key="--judge") from error
