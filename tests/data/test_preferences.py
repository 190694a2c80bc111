"""Records of preferences: what is read, and what is refused."""

from __future__ import annotations

import gzip
import json

import pytest

from jaxtune.core.errors import RequestError
from jaxtune.data.formats import instruction_prompt, parse
from jaxtune.data.preferences import Alternatives, Steps, common_text, split_pair

HELLO = {"role": "user", "content": "Hello"}


def says(words: str) -> dict[str, str]:
    return {"role": "assistant", "content": words}


def test_a_pair_is_read_in_each_of_its_forms():
    strings = {"prompt": "Hi", "chosen": " a", "rejected": " b", "margin": 2, "weight": 0.5}
    assert parse(strings, "preference") == Alternatives(
        "Hi", (" a", " b"), "preference", weight=0.5, margin=2.0
    )
    want = Alternatives((HELLO,), ((says("a"),), (says("b"),)), "preference")
    for record in (
        {"prompt": [HELLO], "chosen": "a", "rejected": "b"},
        {"prompt": [HELLO], "chosen": [says("a")], "rejected": [says("b")]},
        {"prompt": "Hello", "chosen": [says("a")], "rejected": [says("b")]},
        {"chosen": [HELLO, says("a")], "rejected": [HELLO, says("b")]},
        {"prompt": "Hello", "chosen": [HELLO, says("a")], "rejected": [HELLO, says("b")]},
        {"prompt": [HELLO], "chosen": [HELLO, says("a")], "rejected": [HELLO, says("b")]},
        {"prompt": None, "chosen": [HELLO, says("a")], "rejected": [HELLO, says("b")]},
    ):
        assert parse(record, "preference") == want
    asked = {"instruction": "Add", "input": "1 1", "chosen": "2", "rejected": "3"}
    assert parse(asked, "preference").prompt == instruction_prompt("Add", "1 1")
    assert parse(asked, "preference", chat=True).prompt[0]["content"] == "Add\n\n1 1"


def test_the_prompt_that_texts_share():
    talk = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
    assert common_text([f"{talk} yes", f"{talk} yellow"]) == talk
    assert common_text([f"{talk}", f"{talk} yellow"]) == talk
    # They part in the first answer: the human's turns behind it are what follows from it.
    first = "\n\nHuman: a\n\nAssistant:"
    assert common_text([f"{first} b\n\nHuman: c\n\nAssistant: d", f"{first} e"]) == first
    assert common_text(["\n\nHuman: a", "\n\nHuman: b\n\nAssistant: c"]) == ""
    for left, right, want in (
        ("2 + 2 is 4", "2 + 2 is 41", "2 + 2 is"),
        ("2 + 2 is  4", "2 + 2 is  5", "2 + 2 is"),
        ("ab", "ac", ""),
        ("one two", "one", ""),
    ):
        assert common_text([left, right]) == common_text([right, left]) == want


def test_other_judgements():
    record = {"prompt": "p", "completion": "c", "label": True}
    assert parse(record, "unpaired") == Alternatives("p", ("c",), "unpaired", label=1.0)
    assert parse(record | {"label": 0}, "unpaired").label == 0.0
    record = {"prompt": "p", "completions": ["a", "b", "c"]}
    assert parse(record, "ranked").completions == ("a", "b", "c")
    assert parse(record | {"scores": [1, -2.5, 3]}, "ranked").completions == ("c", "a", "b")
    record = {"prompt": "p", "completions": ["a", "b"], "labels": [True, False]}
    assert parse(record, "stepwise") == Steps("p", ("a", "b"), (1.0, 0.0))
    assert parse(record | {"labels": [0.25, 1]}, "stepwise").labels == (0.25, 1.0)
    pair = parse({"prompt": "p", "chosen": "a", "rejected": "b", "weight": 2}, "preference")
    assert split_pair(pair) == (
        Alternatives("p", ("a",), "unpaired", 2.0, label=1.0),
        Alternatives("p", ("b",), "unpaired", 2.0, label=0.0),
    )


PAIR = {"prompt": "p", "chosen": "a", "rejected": "b"}
TALK = "\n\nHuman: a\n\nAssistant:"
LIST = {"prompt": "p", "completions": ["a", "b"]}


@pytest.mark.parametrize(
    ("format", "record", "words"),
    [
        ("preference", PAIR | {"rejected": "a"}, "are equal"),
        ("preference", PAIR | {"rejected": " "}, "'rejected' is empty"),
        ("preference", PAIR | {"chosen": 3}, "'chosen' must be a string or messages"),
        ("preference", PAIR | {"chosen": [says("a")]}, "'chosen' is no string"),
        ("preference", {"prompt": "p", "chosen": "a"}, "no field 'rejected'"),
        ("preference", PAIR | {"margin": float("nan")}, "'margin' must be finite"),
        ("preference", PAIR | {"margin": "1"}, "'margin' must be a number, not string"),
        ("preference", PAIR | {"weight": float("inf")}, "'weight' must be finite"),
        ("preference", PAIR | {"weight": -1}, "'weight' must be 0 or more"),
        ("preference", PAIR | {"weight": 1e39}, "'weight' must be finite in 32 bits"),
        ("preference", PAIR | {"prompt": []}, "'prompt' is empty"),
        ("preference", PAIR | {"prompt": 1}, "'prompt' must be an array"),
        ("preference", PAIR | {"prompt": [HELLO, says("x")]}, "is the assistant's"),
        ("preference", {"chosen": "ab", "rejected": "cd"}, "do not begin with the same one"),
        ("preference", {"chosen": TALK, "rejected": f"{TALK} a"}, "'chosen' is empty behind"),
        (
            "preference",
            {"chosen": [HELLO, says("a")], "rejected": [says("b")]},
            "no field 'prompt'",
        ),
        (
            "preference",
            {"chosen": [HELLO, says("a")], "rejected": [{**HELLO, "content": "b"}, says("b")]},
            "goes on with the user's message",
        ),
        (
            "preference",
            {"prompt": [HELLO], "chosen": [says("a")], "rejected": [says("b"), HELLO]},
            "must be the assistant's, not the user's",
        ),
        (
            "preference",
            {"prompt": "x", "chosen": [HELLO, says("a")], "rejected": [HELLO, says("b")]},
            "is not the last message",
        ),
        ("unpaired", {"prompt": "p", "completion": "a"}, "no field 'label'"),
        ("unpaired", {"prompt": "p", "completion": "a", "label": 2}, "'label' must be true"),
        ("unpaired", {"prompt": "p", "completion": "a", "label": "yes"}, "'label' must be true"),
        ("unpaired", {"completion": "a", "label": True}, "no field 'prompt'"),
        ("ranked", LIST | {"completions": ["a"]}, "2 or more"),
        ("ranked", LIST | {"completions": ["a", "a"]}, "are equal"),
        ("ranked", LIST | {"completions": "ab"}, "must be an array"),
        ("ranked", LIST | {"scores": [1]}, "1 entries for 2"),
        ("ranked", LIST | {"scores": [1, 1]}, "without a rank"),
        ("ranked", LIST | {"scores": [1, None]}, "scores.1. must be a number"),
        ("stepwise", LIST, "no field 'labels'"),
        ("stepwise", LIST | {"labels": [True]}, "1 entries for 2"),
        ("stepwise", LIST | {"labels": [True, 2]}, "labels.0. must be a number, not boolean"),
        ("stepwise", LIST | {"labels": [0.5, 2]}, "labels.1. must be 0 to 1"),
        ("stepwise", LIST | {"completions": ["a", ""]}, "completions.1. is empty"),
    ],
)
def test_what_is_refused_names_the_line(format, record, words):
    with pytest.raises(RequestError, match=words) as error:
        parse(record, format, where="a.jsonl:3", key="data.train[0]")
    assert (error.value.where, error.value.key) == ("a.jsonl:3", "data.train[0]")


def read_all(rows) -> tuple[list, list[str]]:
    """Returns (row, pair) of the rows that can be read, and why the others cannot."""
    read, reasons = [], []
    for row in rows:
        try:
            read.append((row, parse(row, "preference")))
        except RequestError as error:
            reasons.append(str(error))
    return read, reasons


def test_real_pairs_are_read(shared):
    directory = shared / "data" / "preference"
    with gzip.open(directory / "rasbt_instruction_preference_1100.json.gz") as file:
        read, reasons = read_all(json.load(file))
    assert len(read) == 1094 and len(reasons) == 6
    assert all("are equal" in reason for reason in reasons)
    assert all(pair.completions == (row["chosen"], row["rejected"]) for row, pair in read)
    with gzip.open(directory / "hh_rlhf_harmless_base_test.jsonl.gz") as file:
        read, reasons = read_all(json.loads(line) for line in file)
    assert len(read) == 2308 and len(reasons) == 4
    assert all("empty" in reason for reason in reasons)
    for row, pair in read:
        assert [pair.prompt + side for side in pair.completions] == [row["chosen"], row["rejected"]]
        assert pair.prompt.endswith("\n\nAssistant:")
