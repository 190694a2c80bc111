"""Classification by likelihood: which label a model finds likeliest, and how sure it claims to be.

A label's probability is its likelihood over that of all labels together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxtune.evaluate.bootstrap import Measured, mean_of

BINS = (10, 15)  # of equal width, of the confidence in [0, 1]
FIGURES = (
    "accuracy",
    "balanced_accuracy",
    "macro_f1",
    *(f"ece_{bins}" for bins in BINS),
    "brier",
    "nll",
)


def probabilities(logprobs: np.ndarray) -> np.ndarray:
    """Returns p(label) [N, L], each row summing to 1, from ln p(label | prompt) [N, L].

    >>> probabilities(np.log([[0.02, 0.06]])).round(6).tolist()
    [[0.25, 0.75]]
    """
    shifted = np.exp(logprobs - logprobs.max(axis=1, keepdims=True))
    return shifted / shifted.sum(axis=1, keepdims=True)


def figures(logprobs: np.ndarray, truth: np.ndarray) -> dict[str, Measured]:
    """Returns the figures of a classification, each with what its interval needs.

    `accuracy`; `balanced_accuracy`, the mean recall of the labels that occur; `macro_f1`, the mean
    F1 of the labels that occur or are chosen; `ece_10` and `ece_15`, the expected calibration error
    in so many bins of equal width (Guo et al. 2017, arXiv:1706.04599, eq. 3); `brier`, the squared
    distance to the truth summed over labels, 0 to 2 (Brier 1950); `nll`, −ln p(truth) in nats.

    Args:
        logprobs: float [N, L], ln p(label | prompt).
        truth: int [N], the right label.
    """
    p = probabilities(logprobs)
    count, number = p.shape
    chosen = p.argmax(axis=1)
    right = (chosen == truth).astype(np.float64)
    confidence = p.max(axis=1)
    wanted = np.eye(number)[truth]
    hits = wanted * right[:, None]
    balanced = Measured(np.concatenate([hits, wanted], axis=1), _balanced)
    macro = Measured(np.concatenate([hits, wanted + np.eye(number)[chosen]], axis=1), _macro_f1)
    found = {
        "accuracy": mean_of(right),
        "balanced_accuracy": balanced,
        "macro_f1": macro,
    }
    for bins in BINS:
        part = np.minimum((confidence * bins).astype(int), bins - 1)
        gaps = np.eye(bins)[part] * (right - confidence)[:, None]
        found[f"ece_{bins}"] = Measured(np.concatenate([gaps, np.ones((count, 1))], axis=1), _ece)
    at_truth = logprobs - logprobs.max(axis=1, keepdims=True)
    at_truth = at_truth - np.log(np.exp(at_truth).sum(axis=1, keepdims=True))
    return found | {
        "brier": mean_of(((p - wanted) ** 2).sum(axis=1)),
        "nll": mean_of(-at_truth[np.arange(count), truth]),
    }


def _balanced(sums: np.ndarray) -> np.ndarray:
    hits, wanted = np.split(sums, 2, axis=1)
    return _mean_where(hits, wanted)


def _macro_f1(sums: np.ndarray) -> np.ndarray:
    hits, either = np.split(sums, 2, axis=1)
    return _mean_where(2 * hits, either)


def _mean_where(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """Returns the mean ratio [R] over the columns with something below."""
    ratios = above / np.where(below == 0, 1.0, below)
    return ratios.sum(axis=1) / np.maximum((below > 0).sum(axis=1), 1)


def _ece(sums: np.ndarray) -> np.ndarray:
    return np.abs(sums[:, :-1]).sum(axis=1) / sums[:, -1]


def confusion(logprobs: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Returns int [L, L]: how often the label of the row was taken for that of the column."""
    number = logprobs.shape[1]
    cells = truth * number + logprobs.argmax(axis=1)
    return np.bincount(cells, minlength=number**2).reshape(number, number)


def by_label(counts: np.ndarray, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Returns {label: {"precision", "recall", "f1", "examples"}}; 0 where there is nothing to take.

    >>> by_label(np.array([[3, 1], [1, 0]]), ("a", "b"))["a"]
    {'precision': 0.75, 'recall': 0.75, 'f1': 0.75, 'examples': 4}
    """
    found = {}
    for number, name in enumerate(names):
        hits = float(counts[number, number])
        chosen, wanted = int(counts[:, number].sum()), int(counts[number].sum())
        found[name] = {
            "precision": hits / max(chosen, 1),
            "recall": hits / max(wanted, 1),
            "f1": 2 * hits / max(chosen + wanted, 1),
            "examples": wanted,
        }
    return found
