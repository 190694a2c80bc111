"""Hashes of n-grams of characters and words, for many texts at once."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence

import numpy as np

_NOT_WORD = re.compile(r"[\W_]+")
_CHARACTERS = 5
# Odd, so that it has an inverse modulo 2**64.
_BASE = 0x9E3779B97F4A7C15
_INVERSE = pow(_BASE, -1, 2**64)


def squeezed(text: str) -> str:
    """Returns a text in lower case, its white space as single spaces."""
    return " ".join(text.lower().split())


def words_only(text: str) -> str:
    """Returns the words of a text in lower case with single spaces, punctuation left out."""
    return _NOT_WORD.sub(" ", text.lower()).strip()


def digest(text: str) -> int:
    """Returns a 64-bit hash of a text that is the same in every process; never 0."""
    raw = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(raw, "little") or 1


def _codes(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Returns uint64 [all] code points, and int64 [texts + 1] where texts begin."""
    raw = "".join(texts).encode("utf-32-le", "surrogatepass")
    bounds = np.concatenate([[0], np.cumsum([len(t) for t in texts], dtype=np.int64)])
    return np.frombuffer(raw, np.uint32).astype(np.uint64), bounds


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of MurmurHash3: all bits depend on all bits."""
    x = x ^ (x >> np.uint64(33))
    x = x * np.uint64(0xFF51AFD7ED558CCD)
    x = x ^ (x >> np.uint64(33))
    x = x * np.uint64(0xC4CEB9FE1A85EC53)
    return x ^ (x >> np.uint64(33))


def characters(texts: Sequence[str], n: int = _CHARACTERS) -> tuple[np.ndarray, np.ndarray]:
    """Hashes the n-grams of characters of each text; a shorter text is one n-gram.

    Returns:
        uint64 [all] hashes, not sorted and with repeats, and int64 [texts + 1] where each text's
        begin.
    """
    padded = [text if len(text) >= n else text.ljust(n, "\0") for text in texts]
    codes, bounds = _codes(padded)
    if not len(codes):
        return np.zeros(0, np.uint64), bounds
    rolled = np.zeros(max(len(codes) - n + 1, 0), np.uint64)
    for at in range(n):
        rolled = rolled * np.uint64(_BASE) + codes[at : len(codes) - n + 1 + at]
    counts = np.diff(bounds) - n + 1
    starts = np.concatenate([[0], np.cumsum(counts)])
    index = np.arange(starts[-1]) + np.repeat(bounds[:-1] - starts[:-1], counts)
    return _mix(rolled[index]), starts


class Words:
    """The words of many texts, from which the hash of any n-gram follows at once.

    Args:
        texts: as `words_only` gives them.
    """

    def __init__(self, texts: Sequence[str]):
        # A space after every text keeps the last word of one from the first of the next.
        codes, bounds = _codes([text + " " for text in texts])
        space = codes == 32
        inside = np.concatenate([[False], ~space])
        self.starts = np.flatnonzero(inside[1:] & ~inside[:-1])
        self.ends = np.flatnonzero(inside[1:] & np.concatenate([space[1:], [True]])) + 1
        self.text_of = np.searchsorted(bounds, self.starts, side="right") - 1
        # Prefix sums of code · BASE^position: the hash of [s, e) is their difference · BASE^-s.
        size = len(codes)
        self._sums = np.zeros(size + 1, np.uint64)
        np.cumsum(codes * _powers(_BASE, size), out=self._sums[1:])
        self._inverse = _powers(_INVERSE, size)
        self.counts = np.bincount(self.text_of, minlength=len(texts))

    def grams(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns uint64 [grams] hashes of runs of n words, and int64 [grams] the text of each."""
        if len(self.starts) < n:
            return np.zeros(0, np.uint64), np.zeros(0, np.int64)
        last = n - 1
        first_text = self.text_of[: len(self.text_of) - last]
        whole = first_text == self.text_of[last:]
        starts = self.starts[: len(self.starts) - last][whole]
        ends = self.ends[last:][whole]
        # The separator is one space, whatever the text: a gram is a substring.
        found = (self._sums[ends] - self._sums[starts]) * self._inverse[starts]
        return _mix(found + np.uint64(n)), first_text[whole]


_TABLES: dict[int, np.ndarray] = {}


def _powers(base: int, size: int) -> np.ndarray:
    """Returns uint64 [size], base^i modulo 2**64; kept for the next call."""
    known = _TABLES.get(base)
    if known is None or len(known) < size:
        length = max(size, 1 << 20)
        known = np.full(length, base, np.uint64)
        known[0] = 1
        np.multiply.accumulate(known, out=known)
        _TABLES[base] = known
    return known[:size]


def jaccard(left: np.ndarray, right: np.ndarray) -> float:
    """Returns the Jaccard similarity of two sets of hashes, each unique and sorted."""
    if not len(left) and not len(right):
        return 1.0
    common = len(np.intersect1d(left, right, assume_unique=True))
    return common / (len(left) + len(right) - common)
