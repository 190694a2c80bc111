"""Lengths of rows, and what a seq_len would cut, pad and pack."""

from __future__ import annotations

from typing import Any

import numpy as np

from jaxtune.data.packing import pack

_PERCENTILES = (5, 25, 50, 75, 95, 99)
_BINS = 30
_PACKED = 200_000  # rows packed for the figure; of more, a sample from all over


def describe(lengths: np.ndarray) -> dict[str, Any]:
    """Returns count, mean, extremes, percentiles and a histogram of int [rows] lengths.

    The last bin of the histogram holds everything above the 99.5th percentile.
    """
    if not len(lengths):
        return {"count": 0}
    top = max(float(np.percentile(lengths, 99.5)), float(lengths.min()) + 1)
    width = max(1, int(np.ceil((top - lengths.min() + 1) / _BINS)))
    edges = int(lengths.min()) + width * np.arange(_BINS + 1)
    counts, _ = np.histogram(np.minimum(lengths, edges[-1] - 1), edges)
    filled = int(np.flatnonzero(counts)[-1]) + 1
    return {
        "count": len(lengths),
        "total": int(lengths.sum(dtype=np.int64)),
        "mean": round(float(lengths.mean()), 2),
        "min": int(lengths.min()),
        "max": int(lengths.max()),
        "percentiles": {str(p): int(np.percentile(lengths, p)) for p in _PERCENTILES},
        "histogram": {"edges": edges[: filled + 1].tolist(), "counts": counts[:filled].tolist()},
    }


def fit(lengths: np.ndarray, seq_len: int) -> dict[str, Any]:
    """Returns what rows of `seq_len` tokens make of examples of these lengths.

    Args:
        lengths: int [rows] tokens, all ≥ 1.
        seq_len: tokens a row.

    Returns:
        rows and tokens that a cut would take (`overlong`, `tokens_cut`), the share of padding
        with one example a row, and how full packed rows are, all after that cut.
    """
    cut = np.minimum(lengths, seq_len).astype(np.int64)
    over = lengths > seq_len
    step = max(1, -(-len(cut) // _PACKED))
    sample = cut[::step]
    rows = len(pack(sample, seq_len, seed=0)) if len(sample) else 0
    return {
        "seq_len": seq_len,
        "overlong": int(over.sum()),
        "tokens_cut": int((lengths.astype(np.int64) - cut).sum()),
        "padding_share": round(1 - float(cut.sum()) / max(len(cut) * seq_len, 1), 4),
        "packed_rows": rows * step,
        "packing_efficiency": round(float(sample.sum()) / max(rows * seq_len, 1), 4),
    }
