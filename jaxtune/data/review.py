"""A short look at tokenised examples: how long they are, and how many are there twice."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

# Examples whose tokens are compared: hashing so many takes a second.
COMPARED = 100_000
BINS = 24


def review(lengths: np.ndarray, ids: np.ndarray, offsets: np.ndarray) -> dict[str, Any]:
    """Returns what a person should know of examples before the run is believed.

    Args:
        lengths: int [examples], tokens of each.
        ids: int32 [total], tokens of some or all of them.
        offsets: int [some + 1], where these begin in `ids`.

    Returns:
        `median`, `p95` and `longest` in tokens; `edges` [bins + 1] and `counts` [bins] of a
        histogram; `repeats`, how many of the first `compared` have the tokens of an earlier one.

    >>> found = review(np.array([2, 2, 1]), np.array([5, 6, 5, 6, 7]), np.array([0, 2, 4, 5]))
    >>> found["median"], found["longest"], found["repeats"], found["compared"]
    (2.0, 2, 1, 3)
    """
    compared = min(len(offsets) - 1, COMPARED)
    seen = {
        hashlib.blake2b(ids[offsets[i] : offsets[i + 1]].tobytes(), digest_size=16).digest()
        for i in range(compared)
    }
    longest = int(lengths.max())
    edges = np.unique(np.linspace(0, longest + 1, BINS + 1).astype(int))
    counts, _ = np.histogram(lengths, edges)
    return {
        "median": float(np.median(lengths)),
        "p95": float(np.percentile(lengths, 95)),
        "longest": longest,
        "edges": edges.tolist(),
        "counts": counts.tolist(),
        "compared": compared,
        "repeats": compared - len(seen),
    }
