"""Rewards are called once, in order, on all samples, and those that fail are named."""

from __future__ import annotations

import math
import threading
import time

import numpy as np
import pytest

from jaxtune.core.errors import RequestError
from jaxtune.rl.rewards.calls import MOST_GIVEN_UP
from jaxtune.rl.rewards.reward import Reward, check_columns
from jaxtune.rl.rewards.scores import RewardError, score

PROMPTS = ["a", "b", "c", "d"]
COMPLETIONS = ["1", "22", "333", "4444"]
PLACES = [f"train.jsonl:{i + 1}" for i in range(4)]


def length(prompts, completions):
    return [len(c) for c in completions]


def judge(*rewards, columns=None, **settings):
    return score(rewards, PROMPTS, COMPLETIONS, columns or {}, places=PLACES, **settings)


def test_the_total_is_the_weighted_sum():
    out = judge(
        Reward("length", length, weight=2.0),
        Reward("half", lambda prompts, completions: np.full(4, 0.5, np.float32), weight=-1.0),
    )
    assert list(out.by_function) == ["length", "half"]
    np.testing.assert_array_equal(out.by_function["length"], [1, 2, 3, 4])
    np.testing.assert_array_equal(out.total, [1.5, 3.5, 5.5, 7.5])
    assert not out.dropped.any() and out.faults == ()


def test_a_function_gets_the_columns_that_it_takes():
    seen = {}

    def named(prompts, completions, answer, completion_ids, other="default"):
        seen["named"] = (prompts, completions, answer, completion_ids, other)
        return [0] * 4

    def any_of_them(prompts, completions, *, finished, **columns):
        seen["any"] = (finished, columns)
        return [True, False, np.bool_(True), 0]

    columns = {"answer": [1, 2, 3, 4], "topic": list("wxyz")}
    out = judge(
        Reward("named", named),
        Reward("any", any_of_them),
        Reward("bound", lambda prompts, completions, topic: [topic] * 4, {"topic": 7.0}),
        columns=columns,
        completion_ids=[[1], [2], [3], [4]],
        finished=[True, False, True, True],
    )
    assert seen["named"] == (PROMPTS, COMPLETIONS, [1, 2, 3, 4], [[1], [2], [3], [4]], "default")
    assert seen["any"] == ([True, False, True, True], columns)
    np.testing.assert_array_equal(out.by_function["any"], [1, 0, 1, 0])
    np.testing.assert_array_equal(out.by_function["bound"], [7] * 4)


def test_what_a_function_changes_is_its_own():
    def vandal(prompts, completions, answer):
        prompts.clear(), completions.reverse(), answer.pop()
        return [0.0] * 4

    judge(Reward("vandal", vandal), Reward("length", length), columns={"answer": [1] * 4})
    out = judge(Reward("vandal", vandal), Reward("length", length), columns={"answer": [1] * 4})
    np.testing.assert_array_equal(out.by_function["length"], [1, 2, 3, 4])


def test_none_is_no_score_and_no_failure():
    out = judge(
        Reward("some", lambda prompts, completions: [None, 1.0, None, 2.0]),
        Reward("first", lambda prompts, completions: [3.0, 1.0, None, None], weight=10.0),
    )
    np.testing.assert_array_equal(out.by_function["some"], [math.nan, 1, math.nan, 2])
    np.testing.assert_array_equal(out.total, [30, 11, 0, 2])
    np.testing.assert_array_equal(out.dropped, [False, False, True, False])
    assert out.faults == ()


@pytest.mark.parametrize("value", [math.nan, math.inf, "1", [1.0], {}])
def test_what_is_no_number_is_named_with_its_sample(value):
    reward = Reward("odd", lambda prompts, completions: [1.0, 2.0, value, 4.0])
    with pytest.raises(RewardError, match=r"reward odd gave .*; sample 2 \(train.jsonl:3\)"):
        judge(reward)
    out = judge(Reward("odd", reward.function, on_error="drop"), Reward("length", length))
    np.testing.assert_array_equal(out.dropped, [False, False, True, False])
    np.testing.assert_array_equal(out.total, [2, 4, 0, 8])
    assert len(out.faults) == 1 and "sample 2" in out.faults[0]


def test_a_function_that_raises_is_tried_on_each_sample_to_find_the_one_to_blame():
    def picky(prompts, completions):
        return [1 / (len(c) - 2) for c in completions]

    with pytest.raises(RewardError) as error:
        judge(Reward("picky", picky))
    assert "raised ZeroDivisionError" in str(error.value)
    assert "test_scores.py" in str(error.value)
    assert str(error.value).endswith("sample 1 (train.jsonl:2)")
    assert isinstance(error.value.__cause__, ZeroDivisionError)
    out = judge(Reward("picky", picky, on_error="drop"))
    np.testing.assert_array_equal(out.by_function["picky"], [-1, math.nan, 1, 0.5])
    np.testing.assert_array_equal(out.dropped, [False, True, False, False])


def test_a_function_that_raises_on_many_names_the_first():
    def worse(prompts, completions):
        if max(map(len, completions)) > 2:
            raise KeyError("lost")
        return [0.0] * len(completions)

    with pytest.raises(RewardError, match=r"raised KeyError.* 2 samples, first 2 "):
        judge(Reward("worse", worse))


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda prompts, completions: [1.0] * (len(completions) - 1), "returned 3 scores for 4"),
        (lambda prompts, completions: 1.0, "returned float, not a list"),
        (lambda prompts, completions: None, "returned NoneType"),
        (lambda prompts, completions: [1 / (4 - len(completions))], "raised ZeroDivisionError"),
    ],
)
def test_a_fault_of_the_whole_batch_drops_it(function, reason):
    with pytest.raises(RewardError, match=f"reward whole {reason}.*; 4 samples"):
        judge(Reward("whole", function))
    out = judge(Reward("whole", function, on_error="drop"), Reward("length", length))
    assert out.dropped.all() and not out.total.any()
    np.testing.assert_array_equal(out.by_function["length"], [1, 2, 3, 4])


def test_a_function_that_hangs_is_given_up_and_ends():
    ended = threading.Event()

    def endless(prompts, completions):
        try:
            while True:
                time.sleep(0.001)
        finally:
            ended.set()

    with pytest.raises(RewardError, match=r"reward endless did not return within 0.05 s; 4 sam"):
        judge(Reward("endless", endless, timeout=0.05))
    assert ended.wait(10)
    out = judge(Reward("endless", endless, timeout=0.05, on_error="drop"), Reward("len", length))
    assert out.dropped.all() and not out.total.any()
    assert "endless" in out.faults[0]


def test_calls_that_hang_for_good_do_not_pile_up():
    release, begun = threading.Event(), []

    def stuck(prompts, completions):
        begun.append(1)
        release.wait()  # a wait for a lock takes no notice of what ends a loop

    try:
        reward = Reward("stuck", stuck, timeout=0.01, on_error="drop")
        faults = [judge(reward).faults[0] for _ in range(MOST_GIVEN_UP + 2)]
    finally:
        release.set()
    assert len(begun) == MOST_GIVEN_UP
    assert all("did not return" in line for line in faults[:MOST_GIVEN_UP])
    assert all("still hang" in line for line in faults[MOST_GIVEN_UP:])


def test_a_call_within_its_time_returns_and_raises_as_without_one():
    out = judge(Reward("length", length, timeout=60))
    np.testing.assert_array_equal(out.total, [1, 2, 3, 4])
    with pytest.raises(RewardError, match="ZeroDivisionError"):
        judge(Reward("bad", lambda prompts, completions: 1 / 0, timeout=60))


def test_an_interrupt_is_not_taken_for_a_failure():
    def stopped(prompts, completions):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        judge(Reward("stopped", stopped, on_error="drop"))


def test_no_samples_have_no_scores():
    out = score([Reward("bad", lambda prompts, completions: 1 / 0)], [], [], {})
    assert out.total.shape == out.dropped.shape == (0,)


def test_columns_of_another_length_are_refused():
    with pytest.raises(ValueError, match="answer"):
        judge(Reward("length", length), columns={"answer": [1]})


def test_records_are_checked_before_the_run():
    reward = Reward("exact", length, columns=("answer",), key="objective.rewards[0]")
    check_columns([reward], ["answer", "x"], "train.jsonl")
    with pytest.raises(RequestError, match=r"rewards\[0\].function: exact needs the field 'answ"):
        check_columns([reward], ["x"], "train.jsonl")
    with pytest.raises(RequestError, match="'finished'"):
        check_columns([], ["finished"], "train.jsonl")
