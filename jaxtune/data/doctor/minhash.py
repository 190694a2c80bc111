"""MinHash signatures of rows in bulk, by rensa, and the bands of locality-sensitive hashing.

Broder 1997; banding as in Leskovec, Rajaraman, Ullman, "Mining of Massive Datasets", ch. 3. The
bands are kept in arrays rather than in the library's tables: rows come from several processes, and
finding the rows that share a band by sorting needs no more memory than a column.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jaxtune.data.doctor.ngrams import characters

SIZE = 126
# Rows a band may have: divisors of SIZE.
_ROWS = (14, 9, 7, 6, 3, 2)
_RECALL = 0.995
_SEED = 7


def rows_a_band(near: float) -> int:
    """Returns how many values of a signature make a band.

    As many as let rows that are just so similar share a band with a probability of 0.995, since
    more rows a band mean fewer pairs to compare: two rows of similarity s share one of SIZE / r
    bands with probability 1 - (1 - s^r)^(SIZE / r).

    >>> [rows_a_band(near) for near in (0.9, 0.8, 0.7)]
    [9, 6, 3]
    """
    return next(r for r in _ROWS if 1 - (1 - near**r) ** (SIZE // r) >= _RECALL)


def signatures(texts: Sequence[str], near: float) -> tuple[np.ndarray, np.ndarray]:
    """Signs texts by their character 5-grams.

    Args:
        texts: as `ngrams.squeezed` gives them.
        near: similarity that is looked for.

    Returns:
        uint32 [texts, bands], a hash of each band, and uint8 [texts, SIZE], the low bits of the
        signature, from which similarity is estimated.
    """
    from rensa import RMinHash

    rows = rows_a_band(near)
    hashes, starts = characters(texts)
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(hashes, starts.tolist(), SIZE, _SEED)
    full = np.array(matrix.to_rows(), np.uint32)
    folded = np.zeros((len(texts), SIZE // rows), np.uint64)
    for row in range(rows):
        folded = (folded ^ full[:, row::rows]) * np.uint64(0x9E3779B97F4A7C15)
        folded ^= folded >> np.uint64(29)
    return (folded >> np.uint64(32)).astype(np.uint32), full.astype(np.uint8)


def estimate(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Estimates float [pairs] similarities from low bits of signatures, uint8 [pairs, SIZE].

    Unequal values agree in 8 bits once in 256 (Li and König 2010, b-bit minwise hashing).
    """
    agree = (left == right).mean(axis=1)
    return (agree - 1 / 256) / (1 - 1 / 256)
