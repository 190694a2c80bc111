"""A short look at tokenised examples: how long they are, and how many are there twice."""

from __future__ import annotations

import hashlib
import itertools
from typing import Any

import numpy as np

# Examples whose tokens are compared: hashing so many takes a second.
COMPARED = 100_000
BINS = 24


def digests(ids: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Returns a hash of each of the first COMPARED examples, uint8 [compared, 16].

    Args:
        ids: int32 [total], tokens.
        offsets: int64 [examples + 1], where examples begin in them.
    """
    hashes = [
        hashlib.blake2b(ids[start:end].tobytes(), digest_size=16).digest()
        for start, end in itertools.pairwise(offsets[: COMPARED + 1])
    ]
    return np.frombuffer(b"".join(hashes), np.uint8).reshape(-1, 16)


def review(lengths: np.ndarray, hashes: np.ndarray) -> dict[str, Any]:
    """Returns what a person should know of examples before the run is believed.

    Args:
        lengths: int [examples], tokens of each.
        hashes: of the first of them at least; see `digests`.

    Returns:
        `median`, `p95` and `longest` in tokens; `edges` [bins + 1] and `counts` [bins] of a
        histogram; `repeats`, how many of the first `compared` have the tokens of an earlier one.

    >>> hashes = digests(np.array([5, 6, 5, 6, 7]), np.array([0, 2, 4, 5]))
    >>> found = review(np.array([2, 2, 1]), hashes)
    >>> found["median"], found["longest"], found["repeats"], found["compared"]
    (2.0, 2, 1, 3)
    """
    seen = {row.tobytes() for row in hashes[:COMPARED]}
    compared = min(len(hashes), COMPARED)
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
