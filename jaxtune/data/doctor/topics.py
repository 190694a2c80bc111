"""What rows are about: a sample of them in clusters of the words that they share."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

SAMPLE = 2000  # rows that are looked at
MOST_TERMS, MOST_TOPICS, ROWS_A_TOPIC = 400, 8, 25
_ROUNDS, _STARTS, _NAMED = 20, 4, 6
_GOLDEN = 0x9E3779B97F4A7C15  # its multiples are spread evenly over 64 bits


def sampled(row: int, total: int) -> bool:
    """Tells whether a row is among the about SAMPLE of `total` that are looked at.

    >>> sum(sampled(row, 100_000) for row in range(100_000))
    2000
    """
    return (row * _GOLDEN) % 2**64 < min(SAMPLE / max(total, 1), 1) * 2**64


def topics(rows: Sequence[frozenset[str]], terms: Sequence[str]) -> list[dict[str, object]]:
    """Returns [{"terms", "share"}] of the topics of rows, large ones first.

    The share is that of the rows that have a term at all; a topic is named by the terms whose
    weight in it is furthest above that in all rows.

    Args:
        rows: the words of each.
        terms: words that are neither rare nor grammar.
    """
    terms = list(terms)[:MOST_TERMS]
    weights = _weighted(rows, terms)
    weights = weights[weights.any(axis=1)]
    count = min(MOST_TOPICS, len(weights) // ROWS_A_TOPIC)
    if count < 2:
        return []
    label = clusters(weights, count)
    found = []
    for number in range(count):
        mine = weights[label == number]
        if len(mine):
            above = mine.mean(axis=0) - weights.mean(axis=0)
            best = [at for at in np.argsort(-above, kind="stable")[:_NAMED] if above[at] > 0]
            share = round(len(mine) / len(weights), 4)
            found.append({"terms": [terms[at] for at in best], "share": share})
    return sorted(found, key=lambda topic: -topic["share"])


def clusters(weights: np.ndarray, count: int) -> np.ndarray:
    """Returns the cluster of each row, int64 [N]: spherical k-means (Dhillon and Modha 2001).

    Args:
        weights: float32 [N, V], rows of length 1.
        count: clusters.
    """
    rng = np.random.default_rng(0)
    best, most = np.zeros(len(weights), np.int64), -np.inf
    for _ in range(_STARTS):
        centres = weights[_spread(weights, count, rng)]
        for _ in range(_ROUNDS):
            near = weights @ centres.T
            label = near.argmax(axis=1)
            sums = np.eye(count, dtype=np.float32)[:, label] @ weights
            lengths = np.linalg.norm(sums, axis=1, keepdims=True)
            centres = np.where(lengths > 0, sums / np.maximum(lengths, 1e-12), centres)
        fit = float(near.max(axis=1).sum())
        if fit > most:
            best, most = label, fit
    return best


def _spread(weights: np.ndarray, count: int, rng: np.random.Generator) -> list[int]:
    """Returns rows to begin with, far from each other as k-means++ draws them."""
    chosen = [int(rng.integers(len(weights)))]
    while len(chosen) < count:
        away = np.maximum(1 - (weights @ weights[chosen].T).max(axis=1), 0).astype(np.float64)
        total = away.sum()
        odds = away / total if total > 0 else None
        chosen.append(int(rng.choice(len(weights), p=odds)))
    return chosen


def _weighted(rows: Sequence[frozenset[str]], terms: Sequence[str]) -> np.ndarray:
    """Returns float32 [N, V]: inverse document frequency of the terms that a row has, length 1."""
    place = {term: number for number, term in enumerate(terms)}
    found = np.zeros((len(rows), len(terms)), np.float32)
    for row, words in enumerate(rows):
        found[row, [place[word] for word in words if word in place]] = 1.0
    found *= np.log(len(rows) / np.maximum(found.sum(axis=0), 1.0)).astype(np.float32) + 1.0
    return found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-12)
