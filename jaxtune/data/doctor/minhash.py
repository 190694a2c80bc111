"""MinHash signatures of rows in bulk, by rensa, and the bands of locality-sensitive hashing.

Broder 1997; banding as in Leskovec, Rajaraman, Ullman, "Mining of Massive Datasets", ch. 3. The
bands are kept in arrays rather than in the library's tables: rows come from several processes, and
finding the rows that share a band by sorting needs no more memory than a column.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jaxtune.data.doctor.ngrams import characters

# Similar at 0.8 meet in some band with probability 1 - (1 - 0.8^6)^21 = 0.998; at 0.5, with 0.28.
BANDS, ROWS = 21, 6
SIZE = BANDS * ROWS
_SEED = 7


def signatures(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Signs texts by their character 5-grams.

    Args:
        texts: as `ngrams.squeezed` gives them.

    Returns:
        uint32 [texts, BANDS], a hash of each band, and uint8 [texts, SIZE], the low bits of the
        signature, from which similarity is estimated.
    """
    from rensa import RMinHash

    if not texts:
        return np.zeros((0, BANDS), np.uint32), np.zeros((0, SIZE), np.uint8)
    hashes, starts = characters(texts)
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(hashes, starts.tolist(), SIZE, _SEED)
    full = np.array(matrix.to_rows(), np.uint32)
    folded = np.zeros((len(texts), BANDS), np.uint64)
    for row in range(ROWS):
        folded = (folded ^ full[:, row::ROWS]) * np.uint64(0x9E3779B97F4A7C15)
        folded ^= folded >> np.uint64(29)
    return (folded >> np.uint64(32)).astype(np.uint32), full.astype(np.uint8)


def estimate(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Estimates float [pairs] similarities from low bits of signatures, uint8 [pairs, SIZE].

    Unequal values agree in 8 bits once in 256 (Li and König 2010, b-bit minwise hashing).
    """
    agree = (left == right).mean(axis=1)
    return (agree - 1 / 256) / (1 - 1 / 256)
