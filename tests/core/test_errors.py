"""The message of a refused request."""

import pytest

from jaxtune.core.errors import RequestError, nearest


@pytest.mark.parametrize(
    ("key", "where", "text"),
    [
        (None, None, "is wrong"),
        ("peft.rank", None, "peft.rank: is wrong"),
        (None, "a.jsonl:3", "a.jsonl:3: is wrong"),
        ("data", "a.jsonl:3", "a.jsonl:3: data: is wrong"),
    ],
)
def test_place_and_key_stand_before_the_message(key, where, text):
    error = RequestError("is\n  wrong ", key=key, where=where)
    assert str(error) == text
    assert (error.message, error.key, error.where) == ("is wrong", key, where)


def test_the_nearest_name_is_offered_only_if_it_is_near():
    assert nearest("alhpa", ["alpha", "rank"]) == " (did you mean 'alpha'?)"
    assert nearest("zzz", ["alpha", "rank"]) == ""
    assert nearest("x", []) == ""
