"""Ranked lists, process rewards and calibration against loops."""

from __future__ import annotations

import itertools

import jax.numpy as jnp
import numpy as np

from jaxtune.core.weighted import Weighted
from jaxtune.objectives import reward
from jaxtune.objectives.completions import Pair

RNG = np.random.default_rng(0)
SCORES = RNG.standard_normal((3, 5)).astype(np.float32)
LISTS = np.array([[1, 1, 1, 1, 0], [1, 1, 2, 2, 2], [0, 0, 0, 0, 0]], np.int32)
# The second and third of the first list are equally good.
RANKS = np.array([[3, 1, 1, 0, 0], [0, 1, 2, 0, 1], [0, 0, 0, 0, 0]])
WEIGHTS = np.array([[2.0] * 5, [1.0, 1.0, 0.5, 0.5, 0.5], [1.0] * 5], np.float32)


def log_sigmoid(x):
    return -np.log1p(np.exp(-x))


def test_ranked_lists_have_one_vote_each():
    loss = weight = right = 0.0
    for row, number in ((0, 1), (1, 1), (1, 2)):
        mine = [c for c in range(5) if LISTS[row, c] == number]
        ordered = [(i, j) for i in mine for j in mine if RANKS[row, i] < RANKS[row, j]]
        gaps = np.array([SCORES[row, i] - SCORES[row, j] for i, j in ordered], np.float64)
        own = WEIGHTS[row, mine[0]]
        loss += own * np.mean(-log_sigmoid(gaps))
        right += own * np.mean(gaps > 0)
        weight += own
    found, metrics = reward.ranked_loss(SCORES, LISTS, RANKS, WEIGHTS)
    np.testing.assert_allclose(found.sum, loss, rtol=1e-5)
    np.testing.assert_allclose(found.weight, weight, rtol=1e-6)
    np.testing.assert_allclose(metrics["rewards/accuracy"].sum, right, rtol=1e-5)


def test_lists_of_two_are_pairs():
    sides = Pair(SCORES[:, 0:4:2], SCORES[:, 1:4:2])
    lists = np.broadcast_to([1, 1, 2, 2], (3, 4))
    ranks = np.broadcast_to([0, 1, 0, 1], (3, 4))
    weights, margin = np.array([[1.0, 2.0], [0.5, 1.0], [3.0, 1.0]]), np.array([0.3, 0.7])
    each = (weights.repeat(2, axis=1), margin.repeat(2))
    found, _ = reward.ranked_loss(SCORES[:, :4], lists, ranks, *each)
    pairs, _ = reward.reward_loss(sides, weights, margin=margin)
    np.testing.assert_allclose(found, pairs, rtol=1e-6)


def test_steps_are_cross_entropy_where_a_step_ends():
    ends = np.array([[0, 1, 0, 0, 1], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0]], np.float32)
    labels = np.array([[1, 1, 1, 0, 0], [1, 0, 0, 0, 0], [1, 1, 1, 1, 1]], np.float32)
    scores = np.where(ends == 0, np.nan, 30 * SCORES)
    loss, metrics = reward.step_loss(scores, labels, ends)
    wanted = [
        -log_sigmoid(np.float64(s if label else -s))
        for s, label, end in zip(scores.flat, labels.flat, ends.flat, strict=True)
        if end
    ]
    np.testing.assert_allclose(loss.sum, sum(wanted), rtol=1e-5)
    assert loss.weight == 3
    right = ((scores > 0) == (labels > 0))[ends > 0].sum()
    assert metrics["accuracy"] == Weighted(right, 3)


def test_calibration_adds_over_batches():
    margin = 4 * RNG.standard_normal((8, 40)).astype(np.float32)
    # Right about as often as claimed, but for large margins, which are right half of the time.
    weights = np.where(RNG.random(margin.shape) < 0.8, 1.0, 0.0).astype(np.float32)
    claimed = 1 / (1 + np.exp(-np.abs(np.float64(margin))))
    edges = np.linspace(0.5, 1, 11)
    wanted = 0.0
    for low, high in itertools.pairwise(edges):
        inside = (weights > 0) & (claimed >= low) & ((claimed < high) | (high == 1))
        if inside.any():
            gap = (margin > 0)[inside].mean() - claimed[inside].mean()
            wanted += abs(gap) * inside.sum() / (weights > 0).sum()
    parts = [
        reward.calibration_gaps(margin[rows], weights[rows]) for rows in (slice(0, 3), slice(3, 8))
    ]
    means = {name: (parts[0][name] + parts[1][name]).mean() for name in parts[0]}
    found = reward.calibration_error(means | {"rewards/accuracy": 0.7})
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    assert found > 0.1


def test_a_calibrated_model_has_no_error():
    """Of pairs with the same margin, σ(margin) are right."""
    margin = np.log(3.0).astype(np.float32) * np.array([[1, 1, 1, -1]], np.float32)
    means = {k: v.mean() for k, v in reward.calibration_gaps(margin, jnp.ones((1, 4))).items()}
    assert reward.calibration_error(means) < 1e-6
