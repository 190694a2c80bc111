"""What the built-in rewards give."""

from __future__ import annotations

import gzip
import json
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from jaxtune.core.errors import RequestError
from jaxtune.rl.rewards import latex_answer, sandbox
from jaxtune.rl.rewards.math_answer import marked, numbers, rational, same
from jaxtune.rl.rewards.named import build_rewards
from jaxtune.rl.rewards.scores import score

MATH = Path("/work/shared/data/math")


def give(function, completions, arguments=None, load_model=None, ids=None, **columns):
    """Returns what one built-in reward gives, NaN for no score."""
    entry = {"function": function, "arguments": arguments or {}}
    rewards = build_rewards([entry], load_model=load_model)
    prompts = [f"p{i}" for i in range(len(completions))]
    out = score(rewards, prompts, completions, columns, completion_ids=ids)
    return out.by_function[function].tolist()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, [1, 0, 1, 0, 0]),
        ({"ignore_space": False}, [1, 0, 0, 0, 0]),
        ({"ignore_case": True}, [1, 1, 1, 0, 0]),
        ({"ignore_punctuation": True}, [1, 0, 1, 1, 0]),
    ],
)
def test_exact_match(arguments, expected):
    completions = ["New York", "new york", " New \n York", "New York.", "Newark"]
    assert give("exact_match", completions, arguments, answer=["New York"] * 5) == expected


def test_exact_match_with_several_answers_and_none():
    got = give("exact_match", ["b", "c", "x"], {"column": "a"}, a=[["a", "b"], ["a"], None])
    np.testing.assert_array_equal(got, [1, 0, np.nan])


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"word": "dog"}, [1, 1, 0, 0]),
        ({"word": "dog", "ignore_case": False}, [1, 0, 0, 0]),
        ({"word": "dog", "whole_word": False}, [1, 1, 1, 0]),
        ({"word": "c++"}, [0, 0, 0, 1]),
    ],
)
def test_contains(arguments, expected):
    assert give("contains", ["a dog.", "DOG", "dogma", "in C++, mostly"], arguments) == expected


def test_contains_words_of_the_record():
    got = give("contains", ["a b c"] * 3, {"column": "w"}, w=["B", ["a", "x"], None])
    np.testing.assert_array_equal(got, [1, 0.5, np.nan])


def test_patterns():
    completions = ["<a>1\n2</a>", "say <a>1</a>", " <a>1</a>\n"]
    assert give("regex", completions, {"pattern": "<a>.*</a>"}) == [1, 1, 1]
    assert give("format", completions, {"pattern": "<a>.*</a>"}) == [1, 0, 1]


def test_length():
    ids = [list(range(n)) for n in range(8)]
    arguments = {"low": 2, "high": 4, "slack": 1}
    expected = [0, 0.5, 1, 1, 1, 0.5, 0, 0]
    assert give("length", [""] * 8, arguments, ids=ids) == expected
    words = ["a " * n for n in range(8)]
    assert give("length", words, {**arguments, "unit": "words"}) == expected
    text = ["a" * n for n in range(8)]
    assert give("length", text, {**arguments, "unit": "characters"}) == expected
    assert give("length", text, {"low": 3, "unit": "characters"}) == [0, 0, 0, 1, 1, 1, 1, 1]


def test_repetition():
    texts = ["a b c d", "a b A b a b", "a a a a a", "a", ""]
    np.testing.assert_allclose(give("repetition", texts, {"n": 2}), [0, 2 / 5 - 1, 1 / 4 - 1, 0, 0])
    assert give("repetition", ["", ""], {"n": 1, "unit": "tokens"}, ids=[[1, 1], [1, 2]]) == [
        -0.5,
        0,
    ]


class Model:
    """Gives each text its length."""

    def __init__(self):
        self.batches = []

    def scores(self, texts):
        self.batches.append(list(texts))
        return np.array([len(t) for t in texts], np.float32)


def test_a_reward_model_sees_prompt_and_completion_in_batches(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    model, loads = Model(), []

    def load(path):
        loads.append(path)
        return model

    arguments = {"path": str(tmp_path), "batch_size": 2}
    rewards = build_rewards([{"function": "reward_model", "arguments": arguments}], load_model=load)
    assert loads == []
    for _ in range(2):
        out = score(rewards, ["p", "pp", "p"], ["c", "c", "ccc"], {})
        np.testing.assert_array_equal(out.total, [2, 3, 4])
    assert loads == [str(tmp_path)]
    assert model.batches[:2] == [["pc", "ppc"], ["pccc"]]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("42", 42),
        ("-1,234,567.50", Fraction(-2469135, 2)),
        ("$18.00", 18),
        ("\\$18", 18),
        ("-$5", -5),
        ("50%", 50),
        ("12\\%", 12),
        (".5", Fraction(1, 2)),
        ("3/4", Fraction(3, 4)),
        ("-3 / 4", Fraction(-3, 4)),
        ("3/-4", Fraction(-3, 4)),
        (r"\frac{3}{4}", Fraction(3, 4)),
        (r"-\dfrac34", Fraction(-3, 4)),
        (r"\frac{-3}{4}", Fraction(-3, 4)),
        ("1e3", 1000),
        ("−7", -7),
        ("8.", 8),
        ("1 000", 1000),
        (r"10{,}000", None),
        ("1,23", None),
        ("1/0", None),
        ("1e999999999", None),
        ("9" * 101, None),
        ("9" * 10**6, None),
        ("", None),
        ("-", None),
        ("x", None),
        (r"2\frac{1}{2}", None),
        (r"\frac{1}{2}\frac{1}{2}", None),
        (r"\frac{x}{2}", None),
    ],
)
def test_numbers_are_read_exactly(text, value):
    assert rational(text) == value


def test_numbers_in_prose():
    text = "He paid $1,200.50, i.e. 3-2=1 of -4; 5/8 (or -.5) of 1,23 and x2."
    assert numbers(text) == ["1,200.50", "3", "2", "1", "-4", "5/8", "-.5", "1", "23", "2"]


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("#### 5\nand then #### 18 \nnext question", "18"),
        (r"\boxed{1} so \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"#### 3 and \boxed{4}", "4"),
        (r"\boxed{\frac{1}{2}", None),
        (r"\boxed{}", None),
        ("####", None),
        ("18", None),
    ],
)
def test_the_marked_answer(text, answer):
    assert marked(text) == answer


def test_math():
    completions = [
        "16 - 3 - 4 = 9 eggs, so $18.\n#### 18",
        "#### 18 dollars",
        r"The answer is \boxed{36/2}.",
        "So she makes $18.00 a day.",
        "#### 17",
        "no idea",
        "#### 18 or 19",
        "#### eighteen",
        "It is \\boxed{18",
    ]
    expected = [1, 1, 1, 1, 0, 0, 0, 0, 0]
    assert give("math", completions, answer=["9 * 2 = 18 a day\n#### 18"] * 9) == expected
    expected[3] = 0
    assert give("math", completions, {"last_number": False}, answer=["18"] * 9) == expected
    assert give("math", ["5"] * 2, answer=[5, 6]) == [1, 0]
    np.testing.assert_array_equal(give("math", ["1"], answer=[None]), [np.nan])


@pytest.mark.skipif(not MATH.is_dir(), reason="needs the shared data")
def test_every_solution_of_gsm8k_is_right_and_none_is_its_neighbours():
    with gzip.open(MATH / "gsm8k_test.jsonl.gz", "rt") as lines:
        answers = [json.loads(line)["answer"] for line in lines]
    assert give("math", answers, answer=answers) == [1] * len(answers)
    values = [rational(marked(a)) for a in answers]
    assert None not in values
    shifted = answers[1:] + answers[:1]
    expected = [float(a == b) for a, b in zip(values, values[1:] + values[:1], strict=True)]
    assert give("math", shifted, answer=answers) == expected


@pytest.mark.skipif(not MATH.is_dir(), reason="needs the shared data")
def test_every_solution_of_math500_is_right():
    with gzip.open(MATH / "math500_test.json.gz", "rt") as file:
        text = file.read()
    rows = json.loads(text) if text.startswith("[") else list(map(json.loads, text.splitlines()))
    solutions, answers = [r["solution"] for r in rows], [r["answer"] for r in rows]
    assert np.mean(give("math", solutions, answer=answers)) > 0.99


def test_latex_answers():
    pytest.importorskip("math_verify")
    gold = [r"\frac{\sqrt{3}}{3}", "x^2+1", r"\{1,2\}", "x", r"\frac{1}{2}", "2x"]
    said = [r"\frac{1}{\sqrt{3}}", "1+x^2", r"\{2,1\}", "y", "0.5", r"\frac{"]
    boxed = [rf"\boxed{{{text}}}" for text in said]
    assert give("math", boxed, answer=gold) == [0, 0, 0, 0, 1, 0]
    assert give("math", boxed, {"latex": True}, answer=gold) == [1, 1, 1, 0, 1, 0]


def test_a_latex_answer_without_end_takes_nobody_along(monkeypatch):
    """A process that does not end is followed by one for each pair."""
    calls = []

    def run(program, tests, limits, isolation):
        calls.append(len(tests))
        hangs = any("endless" in test for test in tests)
        failures = ["late" if hangs or "x" not in test else None for test in tests]
        return sandbox.Outcome(failures, not hangs)

    monkeypatch.setattr(sandbox, "run", run)
    pairs = [("x", "x"), ("endless", "1"), ("2", "3"), ("x", "x" * 501)]
    assert latex_answer.equal(pairs) == [True, False, False, False]
    assert calls == [3, 1, 1, 1]


def test_latex_needs_its_package(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RequestError, match=r"arguments.latex: needs the package math-verify"):
        give("math", ["1"], {"latex": True}, answer=["1"])


def test_the_same_answer():
    assert same("18", "18 eggs") and not same("18", r"\frac{18}{x}")
    assert not same("18", "17 or 18")


@pytest.mark.parametrize(
    ("function", "arguments", "key"),
    [
        ("regex", {"pattern": "("}, "pattern"),
        ("regex", {}, "pattern"),
        ("format", {"pattern": 1}, "pattern"),
        ("length", {"low": -1}, "low"),
        ("length", {"low": 3, "high": 2}, "high"),
        ("length", {"unit": "letters"}, "unit"),
        ("length", {"slack": True}, "slack"),
        ("repetition", {"n": 0}, "n"),
        ("math", {"latex": 1}, "latex"),
        ("code", {"score": "some"}, "score"),
        ("code", {"seconds": 0}, "seconds"),
        ("code", {"memory": 1}, "memory"),
        ("code", {"isolation": "total"}, "isolation"),
        ("code", {"workers": 0}, "workers"),
        ("reward_model", {"path": "/nowhere"}, "path"),
        ("reward_model", {}, "path"),
        ("reward_model", {"path": "/", "load_model": 1}, "load_model"),
    ],
)
def test_arguments_are_checked(function, arguments, key):
    with pytest.raises(RequestError) as error:
        build_rewards([{"function": function, "arguments": arguments}])
    assert error.value.key == f"objective.rewards[0].arguments.{key}"
