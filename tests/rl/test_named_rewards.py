"""A reward is found by name, module or file, and checked before anything is loaded."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from jaxtune.core.errors import RequestError
from jaxtune.rl.rewards.named import build_rewards
from jaxtune.rl.rewards.scores import score

FILE = """
from __future__ import annotations
import dataclasses

@dataclasses.dataclass
class Scale:
    by: float

def scaled(prompts, completions, *, by, answer, bonus=0.0):
    return [Scale(len(c)).by * by + a + bonus for c, a in zip(completions, answer)]

def loose(prompts, completions, **columns):
    return [columns["extra"]] * len(completions)

class Judge:
    def __call__(self, prompts, completions):
        return [7.0] * len(completions)

judge = Judge()
number = 3
def nullary(): ...
def swapped(completions, prompts): ...
def positional(prompts, completions, /): ...
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(FILE)
    return str(path)


def fault(function, arguments=None, **more):
    with pytest.raises(RequestError) as error:
        build_rewards([{"function": function, "arguments": arguments or {}, **more}])
    return error.value


def test_a_function_of_a_file(file):
    (reward,) = build_rewards(
        [{"function": f"{file}:scaled", "arguments": {"by": 2}, "weight": 0.5, "timeout": 9.0}]
    )
    assert (reward.name, reward.weight, reward.timeout) == ("scaled", 0.5, 9.0)
    assert reward.columns == ("answer",)
    out = score([reward], ["p"], ["abc"], {"answer": [10], "unused": [0]})
    np.testing.assert_array_equal(out.by_function["scaled"], [16])


def test_arguments_of_a_function_that_takes_any(file):
    rewards = build_rewards(
        [
            {"function": f"{file}:loose", "arguments": {"extra": 4.0}},
            {"function": f"{file}:judge"},
        ]
    )
    assert [r.name for r in rewards] == ["loose", "judge"]
    np.testing.assert_array_equal(score(rewards, ["p"], ["c"], {"extra": [1.0]}).total, [11])


def test_a_function_of_a_module(file, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    (reward,) = build_rewards([{"function": "mine:judge"}])
    assert reward.function([], ["a"]) == [7.0]


def test_names_are_unique():
    rewards = build_rewards(
        [
            {"function": "contains", "arguments": {"word": "a"}},
            {"function": "exact_match"},
            {"function": "contains", "arguments": {"word": "b"}},
        ]
    )
    assert [r.name for r in rewards] == ["contains-0", "exact_match", "contains-2"]
    assert [r.key for r in rewards] == [f"objective.rewards[{i}]" for i in range(3)]


def test_a_name_that_is_not_known():
    error = fault("exact_mach")
    assert error.key == "objective.rewards[0].function"
    assert "did you mean 'exact_match'" in str(error)


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("no_such_module:f", "no module 'no_such_module'"),
        ("no.such.file.py:f", "no file"),
        ("math:", "expected module:function"),
        (":f", "expected module:function"),
        ("math:sqqrt", "did you mean 'sqrt'"),
        ("math:pi", "is float, not a function"),
        ("math:sqrt", r"\(prompts, completions, \*\*columns\)"),
        ("FILE:number", "is int, not a function"),
        ("FILE:nullary", r"takes \(no arguments\); a reward is called as"),
        ("FILE:swapped", r"takes \(completions, prompts\)"),
        ("FILE:positional", "takes"),
    ],
)
def test_a_function_that_cannot_be_had(file, function, said):
    error = fault(function.replace("FILE", file))
    assert error.key == "objective.rewards[0].function"
    with pytest.raises(RequestError, match=said):
        raise error


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ("import os\nboom\n", 2, "NameError: name 'boom' is not defined"),
        ("def f(:\n", 1, "SyntaxError"),
        ("import no_such_package\n", 1, "No module named 'no_such_package'"),
        ("\nraise SystemExit(3)\n", 2, "SystemExit"),
    ],
)
def test_a_file_that_fails_is_named_with_its_line(tmp_path, text, line, said):
    path = tmp_path / "bad.py"
    path.write_text(text)
    for _ in range(2):  # a module that failed is not kept
        error = fault(f"{path}:f")
        assert said in str(error) and error.where == f"{path}:{line}"


@pytest.mark.parametrize(
    ("function", "arguments", "key"),
    [
        ("FILE:scaled", {"bi": 1}, "arguments.bi"),
        ("FILE:scaled", {"by": 1, "prompts": 1}, "arguments.prompts"),
        ("FILE:loose", {"completions": 1}, "arguments.completions"),
        ("contains", {"word": "a", "colunm": "b"}, "arguments.colunm"),
        ("contains", {}, "arguments.word"),
        ("contains", {"word": "a", "column": "b"}, "arguments.word"),
        ("contains", {"word": 3}, "arguments.word"),
        ("contains", {"word": "a", "ignore_case": "yes"}, "arguments.ignore_case"),
        ("exact_match", {"column": ""}, "arguments.column"),
    ],
)
def test_an_argument_that_is_wrong(file, function, arguments, key):
    error = fault(function.replace("FILE", file), arguments)
    assert error.key == f"objective.rewards[0].{key}"


def test_no_rewards_are_refused():
    with pytest.raises(RequestError, match="is empty"):
        build_rewards([])
