"""Rollouts without a model: which prompts, which rows in which step, what a checkpoint holds."""

from __future__ import annotations

import types

import numpy as np
import pytest

from jaxtune.data.prompts import Prompts, read_prompts
from jaxtune.data.sources import open_source
from jaxtune.data.tokenizer import load_tokenizer
from jaxtune.recipes import grpo, ppo
from jaxtune.rl.engine import Sample
from jaxtune.rl.groups import Group, Prompt, Rounds, draw_varied, rows_of
from jaxtune.rl.rollouts import Iteration, Rollouts, SamplerMismatch, Schedule, sampler_gap
from tests.rl.tiny import write_prompts, write_tokenizer

STATE = types.SimpleNamespace(trainable={})


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> Prompts:
    where = tmp_path_factory.mktemp("prompts")
    tokenizer = load_tokenizer(write_tokenizer(where / "tokenizer"))
    records = [{"prompt": "abcdefgh"[: i + 1], "answer": i} for i in range(8)]
    source = open_source(write_prompts(where / "p.jsonl", records))
    return Prompts((read_prompts(source, tokenizer, max_prompt=9),), seed=1)


def group(rewards: list[float], prompt: str = "ab") -> Group:
    """A group whose samples are as long as their number in it."""
    samples = [Sample([7] * (i + 1), [-0.5] * (i + 1), i > 0) for i in range(len(rewards))]
    texts = ["x" * (i + 1) for i in range(len(rewards))]
    return Group(Prompt([1, 3, 4], prompt, {}, "f:1"), samples, texts, np.array(rewards), {})


def test_every_epoch_of_an_iteration_takes_each_row_once_in_an_order_of_its_own():
    schedule = Schedule(rows=12, batch_size=4, epochs=2, seed=3)
    assert schedule.steps == 6
    taken = [schedule.rows_at(5, step).tolist() for step in range(6)]
    first, second = np.ravel(taken[:3]).tolist(), np.ravel(taken[3:]).tolist()
    assert sorted(first) == sorted(second) == list(range(12)) and first != second
    assert taken == [schedule.rows_at(5, step).tolist() for step in range(6)]
    assert taken[0] != schedule.rows_at(6, 0).tolist()


def test_rounds_take_prompts_by_number_and_later_rounds_move_nothing(prompts):
    rounds, again = Rounds(prompts), Rounds(prompts)
    taken = [[p.text for p in rounds.take(i, 4, 0)] for i in range(4)]
    assert sorted(taken[0] + taken[1]) == sorted(taken[2] + taken[3])
    assert len(set(taken[0] + taken[1])) == 8
    more = again.take(1, 4, 2)
    assert [p.text for p in again.take(1, 4, 0)] == taken[1]
    assert [p.text for p in more] == [p.text for p in rounds.take(1, 4, 2)]
    assert {p.columns["answer"] + 1 for p in more} == {len(p.text) for p in more}
    assert more[0].place.endswith(f":{len(more[0].text)}")


def test_groups_of_equal_rewards_are_replaced_by_those_of_further_prompts(prompts):
    seeds = []

    def draw(some, seed):
        seeds.append(seed)
        return [group([0.0, float(len(p.text) > 5), float("nan")], p.text) for p in some]

    def told(rounds):
        seeds.clear()
        groups, metrics = draw_varied(draw, Rounds(prompts), 0, 4, rounds, seed=9)
        assert len(groups) == 4 and len(set(seeds)) == len(seeds)
        return [g.prompt.text for g in groups], metrics

    plain, metrics = told(0)
    flat = sum(len(text) <= 5 for text in plain) / 4
    assert 0 < flat < 1 and metrics == {"zero_variance": flat} and len(seeds) == 1
    better, metrics = told(20)
    assert all(len(text) > 5 for text in better) and metrics["unreplaced"] == 0
    assert metrics["zero_variance"] == flat and metrics["resampled_rounds"] == len(seeds) - 1
    one, metrics = told(1)
    assert metrics["resampled_rounds"] == 1
    assert sum(len(text) <= 5 for text in one) == 4 * metrics["unreplaced"]


def test_rows_are_prompts_with_their_samples_and_what_is_left_out_is_no_target():
    rows = rows_of([group([1.0, float("nan")]), group([0.0, 2.0])], 8, num_virtual=2)
    assert rows["input_ids"].tolist()[1] == [0, 0, 1, 3, 4, 7, 7, 0]
    assert rows["segment_ids"].tolist()[0] == [1, 1, 1, 1, 1, 1, 0, 0]
    assert rows["positions"].tolist()[3] == [0, 1, 2, 3, 4, 5, 6, 0]
    assert rows["virtual"].tolist()[0] == [0, 1, -1, -1, -1, -1, -1, -1]
    for name in ("loss_mask", "completions"):
        assert rows[name].sum(1).tolist() == [1, 0, 1, 2]
    assert rows["completions"].dtype == np.int32
    assert rows["sampled_logprobs"].tolist()[3] == [0, 0, 0, 0, 0, -0.5, -0.5, 0]


def test_a_sampler_of_another_policy_is_named_and_a_nan_is_left_to_the_loop():
    inside = np.array([[False, True, True]])
    ours, its = np.array([[9.0, -1.0, -2.0]]), np.array([[0.0, -1.0, -2.02]])
    told = sampler_gap(its, ours, inside, 0.05)
    assert told["sampler_gap"] == pytest.approx(0.01)
    assert told["sampler_gap/max"] == pytest.approx(0.02)
    with pytest.raises(SamplerMismatch, match=r"-1.5100.*trainer -1.5000.*max_logprob_gap = 0.005"):
        sampler_gap(its, ours, inside, 0.005)
    with pytest.raises(SamplerMismatch):
        sampler_gap(np.full((1, 3), np.nan), ours, inside, 0.05)
    assert np.isnan(sampler_gap(its, ours * np.nan, inside, 0.05)["sampler_gap"])


def test_a_checkpoint_holds_the_iteration_under_way_and_no_other():
    def roll(state, number, carried):
        rows = {"input_ids": np.arange(8).reshape(4, 2) + 10 * number}
        told = {"reward": 0.1 + number, "reward/std": 0.2}
        return Iteration(rows, told, {"kl_coef": carried["kl_coef"] * 1.1})

    def rollouts(step=0, saved=None):
        schedule = Schedule(rows=4, batch_size=2, epochs=2, seed=0)
        return Rollouts(schedule, roll, step=step, carried={"kl_coef": 0.3}, saved=saved or {})

    whole = rollouts()
    fed, saved = [], []
    for _ in range(9):
        fed.append(whole.feed(STATE))
        saved.append(whole.arrays())
    assert saved[3].keys() == saved[7].keys() == {"carried/kl_coef"}
    for step in range(1, 9):
        other = rollouts(step, saved[step - 1])
        for at in range(step, 9):
            batch, told = other.feed(STATE)
            assert np.array_equal(batch["input_ids"], fed[at][0]["input_ids"])
            for name in ("iteration", "reward", "reward/std"):
                assert told[name] == fed[at][1][name]
        assert other.arrays()["carried/kl_coef"] == saved[8]["carried/kl_coef"]


def settings(**more):
    base = {"kl_coef": 0.0, "kl_in": "loss", "kl_estimator": "k1", "advantage": "group"}
    return types.SimpleNamespace(**base | more)


def test_a_group_without_variance_and_a_sample_without_score_teach_nothing():
    rewards = np.array([[1.0, 1.0, 1.0], [0.0, 1.0, float("nan")]])
    rows = rows_of([group(r) for r in rewards], 6)
    found = grpo.credit(settings(), rewards, rows, {}, 0.0).arrays["advantages"]
    assert not found[:3].any() and not found[5].any()
    inside = rows["loss_mask"] > 0
    assert found[3][inside[3]] == -found[4][inside[4]][0] != 0
    assert not found[~inside].any()


def test_a_kl_in_the_reward_is_the_completions_or_a_tokens_own():
    rewards = np.array([[1.0, 0.0]])
    rows = rows_of([group(rewards[0])], 6)
    inside = rows["loss_mask"] > 0
    rng = np.random.default_rng(0)
    seen = {name: rng.normal(size=inside.shape) for name in ("logprobs", "ref_logprobs")}
    charge = (seen["logprobs"] - seen["ref_logprobs"]) * inside
    o = settings(kl_coef=0.5, kl_in="reward", advantage="group_mean")
    found = grpo.credit(o, rewards, rows, seen, 0.5)
    left = rewards[0] - 0.5 * charge.sum(1)
    assert found.metrics["penalised_reward"] == pytest.approx(left.mean())
    np.testing.assert_allclose(
        found.arrays["advantages"], (left - left.mean())[:, None] * inside, rtol=1e-5
    )
    o = settings(kl_coef=0.5, kl_in="reward", advantage="batch")
    found = grpo.credit(o, rewards, rows, seen, 0.5).arrays["advantages"]
    returns = [
        rewards[0, r] - 0.5 * charge[r, t:].sum()
        for r in range(2)
        for t in np.flatnonzero(inside[r])
    ]
    expected = (returns - np.mean(returns)) / (np.std(returns, ddof=1) + 1e-4)
    np.testing.assert_allclose(found[inside], expected, rtol=1e-5)


def test_the_advantages_of_ppo_are_generalised_estimates_written_out():
    rewards = np.array([[2.0, 1.0]])
    rows = rows_of([group(rewards[0])], 6)
    inside = rows["loss_mask"] > 0
    rng = np.random.default_rng(1)
    seen = {
        name: rng.normal(size=inside.shape).astype(np.float32) for name in ("logprobs", "values")
    }
    seen["ref_logprobs"] = seen["logprobs"] - 0.25
    o = settings(kl_coef=0.5, kl_in="reward", whiten=False, discount=0.9, gae_lambda=0.8)
    found = ppo.credit(o, rewards, rows, seen, 0.4)
    # The second sample has two tokens, at 3 and 4; each is charged 0.4 · 0.25.
    v3, v4 = seen["values"][1, 3:5]
    last = 1.0 - 0.1 - v4
    first = -0.1 + 0.9 * v4 - v3 + 0.9 * 0.8 * last
    np.testing.assert_allclose(found.arrays["advantages"][1, 3:5], [first, last], rtol=1e-5)
    np.testing.assert_allclose(found.arrays["returns"][1, 3:5], [first + v3, last + v4], rtol=1e-5)
    assert not found.arrays["advantages"][~inside].any()
