"""`objective.rewards` of a config is checked entry by entry."""

import pytest

from jaxtune.core.errors import RequestError
from jaxtune.recipes.schema.keys import BY_PATH
from jaxtune.recipes.schema.values import check

KEY = BY_PATH["objective.rewards"]


def test_an_entry_has_defaults():
    (entry,) = check(KEY, [{"function": "math"}])
    assert entry == {
        "function": "math",
        "weight": 1.0,
        "arguments": {},
        "timeout": 300.0,
        "on_error": "stop",
    }


@pytest.mark.parametrize(
    ("entry", "key"),
    [
        ({}, "function"),
        ({"function": ""}, "function"),
        ({"function": "math", "weight": "1"}, "weight"),
        ({"function": "math", "arguments": ["answer"]}, "arguments"),
        ({"function": "math", "timeout": 0}, "timeout"),
        ({"function": "math", "on_error": "ignore"}, "on_error"),
        ({"function": "math", "wieght": 1}, "wieght"),
    ],
)
def test_what_is_wrong_is_named(entry, key):
    with pytest.raises(RequestError) as error:
        check(KEY, [{"function": "format"}, entry])
    assert error.value.key == f"objective.rewards[1].{key}"


def test_penalties_and_no_limit_are_valid():
    entry = {"function": "repetition", "weight": -0.5, "timeout": None, "on_error": "drop"}
    assert check(KEY, [entry])[0]["timeout"] is None
