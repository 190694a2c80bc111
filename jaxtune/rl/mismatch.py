"""How far the sampler's log-probabilities are from the trainer's on the same tokens."""

from __future__ import annotations

import numpy as np


def mismatch(sampled: np.ndarray, trained: np.ndarray, mask: np.ndarray) -> dict[str, float]:
    """Returns the difference d = trained - sampled on the drawn tokens, as metrics.

    0 throughout if both compute the same policy (CORRECTNESS C18, C25). The means estimate the
    divergence KL(sampler ‖ trainer) a token: k1 = -d, which may be negative, and
    k3 = exp(d) - 1 - d, which may not (Schulman 2020, "Approximating KL Divergence").

    Args:
        sampled, trained: float [B, T], ln p of each token under the sampler and the trainer.
        mask: [B, T], above 0 where a token was drawn.

    Returns:
        `max` and `mean` of |d|, the means `k1` and `k3`; not a number where a probability of a
        drawn token is not.

    Raises:
        ValueError: shapes that differ, or a mask without a token.
    """
    sampled, trained, drawn = np.asarray(sampled), np.asarray(trained), np.asarray(mask) > 0
    if not sampled.shape == trained.shape == drawn.shape:
        raise ValueError(f"shapes {sampled.shape}, {trained.shape} and {drawn.shape} differ")
    if not drawn.any():
        raise ValueError("no token was drawn")
    d = trained[drawn].astype(np.float64) - sampled[drawn].astype(np.float64)
    # Below e^-700 or so nothing changes, above a float64 would overflow; the bound is far lower.
    k3 = np.expm1(np.minimum(d, 700.0)) - d
    return {
        "max": float(np.max(np.abs(d))),
        "mean": float(np.mean(np.abs(d))),
        "k1": float(np.mean(-d)),
        "k3": float(np.mean(k3)),
    }
