"""From rewards of sampled completions to advantages, without a value function.

`rewards` are float [P, n]: n samples to each of P prompts, on the host. NaN is a sample that could
not be scored: it is left out of every mean and its advantage is 0. Results are float32 [P, n].
All prompts of an iteration are to be given at once: batch statistics are theirs.
"""

from __future__ import annotations

import numpy as np

EPSILON = 1e-4  # on standard deviations, as TRL has it; rewards are of order 1


def group_mean(rewards: np.ndarray) -> np.ndarray:
    """Returns the mean of each prompt's scored samples, float64 [P, 1]; NaN where none is."""
    scored = ~np.isnan(rewards)
    number = scored.sum(1, keepdims=True)
    total = np.where(scored, rewards, 0.0).sum(1, keepdims=True, dtype=np.float64)
    return np.where(number > 0, total / np.maximum(number, 1), np.nan)


def group_deviation(rewards: np.ndarray) -> np.ndarray:
    """Returns the standard deviation (n − 1) of each prompt's scored samples, float64 [P, 1].

    0 where fewer than two are scored.
    """
    squares = np.square(rewards.astype(np.float64) - group_mean(rewards))
    scored = ~np.isnan(squares)
    number = scored.sum(1, keepdims=True)
    return np.sqrt(np.where(scored, squares, 0.0).sum(1, keepdims=True) / np.maximum(number - 1, 1))


def zero_variance(rewards: np.ndarray) -> np.ndarray:
    """Returns bool [P]: the prompts whose scored samples have one reward, which teach nothing.

    DAPO samples others in their place (Yu et al. 2025, arXiv:2503.14476, eq. 11).

    >>> zero_variance(np.array([[1.0, 1.0], [0.0, 1.0]])).tolist()
    [True, False]
    """
    low = np.where(np.isnan(rewards), np.inf, rewards).min(1)
    high = np.where(np.isnan(rewards), -np.inf, rewards).max(1)
    return ~(high > low)


def group_centred(rewards: np.ndarray) -> np.ndarray:
    """Returns r − mean of the group: Dr. GRPO (Liu et al., arXiv:2503.20783)."""
    return finished(rewards - group_mean(rewards))


def group_normalised(rewards: np.ndarray) -> np.ndarray:
    """Returns (r − mean) / (std + EPSILON) of the group: GRPO (Shao et al., arXiv:2402.03300)."""
    return finished((rewards - group_mean(rewards)) / (group_deviation(rewards) + EPSILON))


def leave_one_out(rewards: np.ndarray) -> np.ndarray:
    """Returns r_i − mean of the group's other samples, 0 where no other is scored: RLOO.

    Ahmadian et al. 2024, arXiv:2402.14740.
    """
    number = (~np.isnan(rewards)).sum(1, keepdims=True)
    # r − (n m − r) / (n − 1) = (r − m) n / (n − 1)
    scale = np.where(number > 1, number / np.maximum(number - 1, 1), 0.0)
    return finished((rewards - group_mean(rewards)) * scale)


def leave_one_out_normalised(rewards: np.ndarray) -> np.ndarray:
    """Returns `leave_one_out`, normalised over the whole batch."""
    scored = np.where(np.isnan(rewards), np.nan, leave_one_out(rewards).astype(np.float64))
    return finished(normalised(scored))


def batch_normalised(rewards: np.ndarray) -> np.ndarray:
    """Returns (r − mean) / (std + EPSILON) over the whole batch: REINFORCE++.

    Hu et al. 2025, arXiv:2501.03262. Its rewards have the KL penalty in them.
    """
    return finished(normalised(rewards.astype(np.float64)))


def group_centred_batch_normalised(rewards: np.ndarray) -> np.ndarray:
    """Returns r − mean of the group, normalised over the whole batch: REINFORCE++-baseline.

    Hu et al. 2025, arXiv:2501.03262.
    """
    return finished(normalised(rewards - group_mean(rewards)))


def group_centred_batch_scaled(rewards: np.ndarray) -> np.ndarray:
    """Returns (r − mean of the group) / (std of all rewards + EPSILON): Lite PPO.

    Liu et al. 2025, arXiv:2508.08221.
    """
    return finished((rewards - group_mean(rewards)) / (deviation(rewards) + EPSILON))


# Name in a config → advantages [P, n] of rewards [P, n]
ADVANTAGES = {
    "group": group_normalised,
    "group_mean": group_centred,
    "leave_one_out": leave_one_out,
    "leave_one_out_normalised": leave_one_out_normalised,
    "batch": batch_normalised,
    "batch_baseline": group_centred_batch_normalised,
    "group_batch_std": group_centred_batch_scaled,
}


def deviation(values: np.ndarray) -> float:
    """Returns the standard deviation (n − 1) of what is not NaN; 0 of fewer than two."""
    known = values[~np.isnan(values)].astype(np.float64)
    return float(known.std(ddof=1)) if known.size > 1 else 0.0


def normalised(values: np.ndarray) -> np.ndarray:
    """Returns (values − mean) / (std + EPSILON) over all that are not NaN, which stay NaN."""
    known = values[~np.isnan(values)]
    mean = known.mean() if known.size else 0.0
    return (values - mean) / (deviation(values) + EPSILON)


def finished(advantages: np.ndarray) -> np.ndarray:
    """Returns float32 advantages, 0 where they are NaN: nothing was scored there."""
    return np.where(np.isnan(advantages), 0.0, advantages).astype(np.float32)


def token_batch_normalised(advantages: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Returns advantages [B, T] normalised over all tokens of mask > 0, 0 elsewhere; float32.

    REINFORCE++ where the KL penalty is a token's own, so that advantages differ within a
    completion; see `penalised_returns`.
    """
    found = normalised(np.where(mask > 0, advantages.astype(np.float64), np.nan))
    return finished(found)


def penalised_returns(
    rewards: np.ndarray, kl: np.ndarray, mask: np.ndarray, coefficient: float
) -> np.ndarray:
    """Returns float32 [B, T]: the completion's reward less β Σ of the KL from this token on.

    REINFORCE++'s return of a token, undiscounted (arXiv:2501.03262).

    Args:
        rewards: [B], one completion a row.
        kl: [B, T], an estimate of each token (k1 as a rule; see `objectives.kl`).
        mask: [B, T], 1 on the completion's tokens.
        coefficient: β.
    """
    later = np.cumsum((kl * (mask > 0)).astype(np.float64)[:, ::-1], axis=1)[:, ::-1]
    return np.where(mask > 0, rewards[:, None] - coefficient * later, 0.0).astype(np.float32)


def token_rewards(
    rewards: np.ndarray, kl: np.ndarray, mask: np.ndarray, coefficient: float
) -> np.ndarray:
    """Returns float32 [B, T], PPO's rewards: −β KL on each token, and the score on the last.

    Ziegler et al. 2019, arXiv:1909.08593, eq. 2; Ouyang et al. 2022, arXiv:2203.02155, eq. 2.
    Arguments as for `penalised_returns`, whose undiscounted sums these are.
    """
    inside = mask > 0
    last = inside & (np.cumsum(inside[:, ::-1], axis=1)[:, ::-1] == 1)
    found = np.where(inside, -coefficient * kl, 0.0) + np.where(last, rewards[:, None], 0.0)
    return found.astype(np.float32)


def soft_overlong(lengths: np.ndarray, limit: int, cache: int) -> np.ndarray:
    """Returns the punishment of long completions, float32 [...] in [−1, 0], to add to rewards.

    0 up to limit − cache tokens, then falling to −1 at the limit, −1 beyond (DAPO,
    arXiv:2503.14476, eq. 13).

    >>> soft_overlong(np.array([70, 90, 100, 101]), limit=100, cache=20).tolist()
    [0.0, -0.5, -1.0, -1.0]

    Args:
        lengths: tokens of completions, [...].
        limit: L_max, tokens.
        cache: L_cache, tokens, > 0.
    """
    over = (np.asarray(lengths, np.float64) - (limit - cache)) / cache
    return -np.clip(over, 0.0, 1.0).astype(np.float32) + np.float32(0.0)


def without_truncated(completions: np.ndarray, truncated: np.ndarray) -> np.ndarray:
    """Returns completions int32 [B, T] with 0 in the rows that reached the limit of tokens.

    They have then neither loss nor part in any normaliser (overlong filtering, DAPO,
    arXiv:2503.14476), while their rewards stay in the statistics of their group.

    Args:
        completions: int32 [B, T].
        truncated: bool [B].
    """
    return np.where(truncated[:, None], 0, completions).astype(np.int32)
