"""How near written texts are to those wanted: names of metrics, and what computes them."""

from __future__ import annotations

import collections
import functools
import re
import string
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxtune.core.errors import RequestError, nearest
from jaxtune.evaluate.bootstrap import Measured, mean_of

# (texts written, texts wanted) → figures by name.
Metric = Callable[[Sequence[str], Sequence[str]], dict[str, Measured]]

_PUNCTUATION = str.maketrans("", "", string.punctuation)


def exact_match(written: Sequence[str], wanted: Sequence[str]) -> dict[str, Measured]:
    """The share that equals the wanted text but for white space at the ends and its amount."""
    same = [a.split() == b.split() for a, b in zip(written, wanted, strict=True)]
    return {"exact_match": mean_of(np.array(same, np.float64))}


def f1(written: Sequence[str], wanted: Sequence[str]) -> dict[str, Measured]:
    """The mean F1 of the words in common (Rajpurkar et al. 2016, arXiv:1606.05250)."""
    pairs = zip(written, wanted, strict=True)
    return {"f1": mean_of(np.array([words_f1(a, b) for a, b in pairs], np.float64))}


def squad_words(text: str) -> list[str]:
    """Returns the words that SQuAD compares: lower case, no ASCII punctuation, no articles.

    >>> squad_words("The cat's  hat.")
    ['cats', 'hat']
    """
    plain = text.lower().translate(_PUNCTUATION)
    return re.sub(r"\b(a|an|the)\b", " ", plain).split()


def words_f1(written: str, wanted: str) -> float:
    """Returns the F1 of the words of two texts; of texts without words, whether both are.

    >>> words_f1("the red hat", "a red red cap")
    0.4
    """
    a, b = squad_words(written), squad_words(wanted)
    if not a or not b:
        return float(a == b)
    common = sum((collections.Counter(a) & collections.Counter(b)).values())
    return 2 * common / (len(a) + len(b))


def bleu(written: Sequence[str], wanted: Sequence[str]) -> dict[str, Measured]:
    """Corpus BLEU, 0 to 100, with sacrebleu's defaults (Post 2018, arXiv:1804.08771)."""
    return {"bleu": _of_corpus(_needed("sacrebleu", "bleu").BLEU(force=True), written, wanted)}


def chrf(written: Sequence[str], wanted: Sequence[str]) -> dict[str, Measured]:
    """Corpus chrF2, 0 to 100, with sacrebleu's defaults (Popović 2015, W15-3049)."""
    return {"chrf": _of_corpus(_needed("sacrebleu", "chrf").CHRF(), written, wanted)}


def _of_corpus(metric: Any, written: Sequence[str], wanted: Sequence[str]) -> Measured:
    # What sacrebleu's own significance tests call: counts of each text, and a score of their sum.
    counts = metric._extract_corpus_statistics(list(written), [list(wanted)])

    def value(sums: np.ndarray) -> np.ndarray:
        return np.array([metric._aggregate_and_compute([row]).score for row in sums.tolist()])

    return Measured(np.array(counts, np.float64), value)


def rouge(written: Sequence[str], wanted: Sequence[str]) -> dict[str, Measured]:
    """Mean F-measures of ROUGE-1, ROUGE-2 and ROUGE-L, words stemmed (Lin 2004, W04-1013)."""
    names = ("rouge1", "rouge2", "rougeL")
    scorer = _needed("rouge_score.rouge_scorer", "rouge").RougeScorer(names, use_stemmer=True)
    found = [scorer.score(b, a) for a, b in zip(written, wanted, strict=True)]
    return {name: mean_of(np.array([one[name].fmeasure for one in found])) for name in names}


def _needed(module: str, metric: str) -> Any:
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise RequestError(
            f"{metric!r} needs {module.partition('.')[0]}: pip install 'jaxtune[eval]' ({error})",
            key="metrics",
        ) from error


# A new metric is one function and one entry here.
METRICS: dict[str, Metric] = {
    "exact_match": exact_match,
    "f1": f1,
    "bleu": bleu,
    "chrf": chrf,
    "rouge": rouge,
}


def check_names(names: Sequence[str], key: str) -> tuple[str, ...]:
    """Returns the names, each once.

    Raises:
        RequestError: an unknown name, or a metric whose package is not installed.
    """
    if not names:
        raise RequestError(f"names no metric; valid: {', '.join(METRICS)}", key=key)
    for name in names:
        if name not in METRICS:
            raise RequestError(
                f"unknown metric {name!r}{nearest(name, METRICS)}; valid: {', '.join(METRICS)}",
                key=key,
            )
    names = tuple(dict.fromkeys(names))
    try:
        figure_names(names)
    except RequestError as error:
        raise RequestError(error.message, key=key) from error
    return names


@functools.cache
def figure_names(names: tuple[str, ...]) -> tuple[str, ...]:
    """Returns the names of the figures that metrics give."""
    return tuple(measure(names, ["a"], ["a"]))


def measure(
    names: Sequence[str], written: Sequence[str], wanted: Sequence[str]
) -> dict[str, Measured]:
    """Returns the figures of metrics by name.

    Args:
        names: in `METRICS`.
        written, wanted: a text of each example.
    """
    found: dict[str, Measured] = {}
    for name in names:
        found |= METRICS[name](written, wanted)
    return found
