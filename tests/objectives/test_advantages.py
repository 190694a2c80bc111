"""Advantages against their formulas in float64, and what they promise."""

from __future__ import annotations

import numpy as np
import pytest

from jaxtune.objectives import advantages as adv

RNG = np.random.default_rng(0)
REWARDS = RNG.standard_normal((4, 6)).astype(np.float32)
NAN = np.float32("nan")


def test_reinforce_pp():
    wanted = (REWARDS - REWARDS.mean()) / (REWARDS.std(ddof=1) + 1e-4)
    np.testing.assert_allclose(adv.batch_normalised(REWARDS), wanted, rtol=1e-5, atol=1e-6)
    centred = REWARDS - REWARDS.mean(1, keepdims=True)
    wanted = (centred - centred.mean()) / (centred.std(ddof=1) + 1e-4)
    found = adv.group_centred_batch_normalised(REWARDS)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


def test_leave_one_out_is_the_reward_less_the_mean_of_the_others():
    for row, advantages in zip(REWARDS, adv.leave_one_out(REWARDS), strict=True):
        wanted = [row[i] - np.delete(row, i).mean() for i in range(len(row))]
        np.testing.assert_allclose(advantages, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", adv.ADVANTAGES)
def test_what_could_not_be_scored_is_left_out(name):
    function = adv.ADVANTAGES[name]
    holes = REWARDS.copy()
    holes[0, 2] = holes[1, :5] = holes[2] = NAN
    found = function(holes)
    assert found.dtype == np.float32 and np.all(np.isfinite(found))
    assert not np.any(found[np.isnan(holes)])
    if name in ("group", "group_mean", "leave_one_out"):
        alone = np.delete(holes[:1], 2, axis=1)
        np.testing.assert_allclose(np.delete(found[:1], 2, axis=1), function(alone), rtol=1e-5)
        assert not np.any(found[1])  # one of a group has nothing to be compared with
    assert not np.any(function(np.full((2, 3), NAN)))


@pytest.mark.parametrize("name", ["group", "group_mean", "leave_one_out"])
def test_a_group_of_equal_rewards_teaches_nothing_and_is_told(name):
    rewards = np.array([[0.1] * 3, [0.1, 0.1, 0.3], [0.1, NAN, 0.1], [NAN] * 3], np.float32)
    np.testing.assert_array_equal(adv.zero_variance(rewards), [True, False, True, True])
    found = adv.ADVANTAGES[name](rewards)
    np.testing.assert_allclose(found[[0, 2, 3]], 0.0, atol=1e-6)
    assert np.all(found[1] != 0)


def test_token_rewards_sum_to_the_penalised_returns():
    mask = np.array([[0, 1, 1, 1, 0], [0, 0, 1, 0, 1], [0, 0, 0, 0, 1]], np.float32)
    kl = RNG.standard_normal(mask.shape).astype(np.float32)
    score = RNG.standard_normal(3).astype(np.float32)
    each = adv.token_rewards(score, kl, mask, 0.1)
    returns = adv.penalised_returns(score, kl, mask, 0.1)
    assert each.dtype == returns.dtype == np.float32
    for row in range(3):
        places = np.flatnonzero(mask[row])
        wanted = [-0.1 * kl[row, t] for t in places]
        wanted[-1] += score[row]
        np.testing.assert_allclose(each[row, places], wanted, rtol=1e-5, atol=1e-6)
        later = [sum(wanted[i:]) for i in range(len(wanted))]
        np.testing.assert_allclose(returns[row, places], later, rtol=1e-5, atol=1e-6)
    assert not np.any(each[mask == 0]) and not np.any(returns[mask == 0])
    normal = adv.token_batch_normalised(returns, mask)
    inside = mask > 0
    np.testing.assert_allclose(normal[inside].mean(), 0, atol=1e-6)
    np.testing.assert_allclose(normal[inside].std(ddof=1), 1, rtol=1e-3)
    assert not np.any(normal[~inside])


def test_truncated_completions_are_taken_out():
    own = np.array([[0, 1, 1], [1, 1, 1]], np.int32)
    found = adv.without_truncated(own, np.array([False, True]))
    np.testing.assert_array_equal(found, [[0, 1, 1], [0, 0, 0]])
