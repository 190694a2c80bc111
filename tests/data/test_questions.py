"""Records as questions: the prompt that generation reads, and any answer as training reads it."""

from __future__ import annotations

import json

import numpy as np
import pytest

from jaxtune.core.errors import RequestError
from jaxtune.data.chat import render_chat, render_completion, render_prompt
from jaxtune.data.parts import MOST, parts_of
from jaxtune.data.questions import read_questions, with_label
from jaxtune.data.sources import open_source
from jaxtune.data.store import tokenize
from jaxtune.data.tokenizer import load_tokenizer
from tests.cli import bad_world

TURNS = [
    {"role": "user", "content": "hello you"},
    {"role": "assistant", "content": "what is it"},
    {"role": "user", "content": "the cat"},
    {"role": "assistant", "content": "sat on a mat"},
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    bad_world.write_tokenizer(directory)
    return load_tokenizer(directory)


def source_of(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return open_source(f"jsonl:{path}")


def test_of_a_conversation_the_last_turn_is_the_answer(tokenizer, tmp_path):
    source = source_of(tmp_path / "a.jsonl", [{"messages": TURNS}])
    (asked,) = read_questions(source, "chat", tokenizer)
    assert list(asked.ids) == render_prompt(TURNS[:-1], tokenizer)
    assert asked.wanted == "sat on a mat"
    assert asked.prompt == "user: hello you\nassistant: what is it\nuser: the cat"
    for answer in ("sat on a mat", "looked at the moon"):
        turns = [*TURNS[:-1], {"role": "assistant", "content": answer}]
        context, continuation = asked.answered(answer, tokenizer)
        whole = render_chat(turns, tokenizer)
        targets = np.flatnonzero(whole.mask)
        assert context + continuation == whole.ids[: targets[-1] + 1].tolist()
        # what is scored is what training would train of the last turn
        assert context == list(asked.ids)
        words = tokenizer.encode(answer, special=False)
        assert continuation == [*words, tokenizer.eos_id]


def test_a_completion_is_split_as_in_training(tokenizer, tmp_path):
    rows = [{"prompt": "the cat", "completion": " sat on", "from": "x"}]
    (asked,) = read_questions(
        source_of(tmp_path / "a.jsonl", rows), "completion", tokenizer, by="from"
    )
    assert asked.group == "x" and list(asked.ids) == tokenizer.encode("the cat")
    assert with_label(asked, "moon") == " moon"
    for answer in (" sat on", " moon"):
        context, continuation = asked.answered(answer, tokenizer)
        whole = render_completion("the cat", answer, tokenizer)
        assert context + continuation == whole.ids.tolist()
        assert continuation == whole.ids[whole.mask > 0].tolist()


@pytest.mark.parametrize(
    ("rows", "format", "told"),
    [
        ([{"text": "a"}], "text", "data.format: 'text' has no prompt with an answer"),
        ([{"prompt": "a"}], "completion", "a.jsonl:1: data"),
        ([{"prompt": "", "completion": "a"}], "completion", "a.jsonl:1: data: the prompt has no"),
        (
            [{"messages": [TURNS[0], {"role": "assistant", "content": None, "tool_calls": [
                {"function": {"name": "f", "arguments": {}}}]}]}],
            "chat", "a.jsonl:1: data: the last turn has no text",
        ),
    ],
)  # fmt: skip
def test_what_has_no_answer_is_refused(tokenizer, tmp_path, rows, format, told):
    source = source_of(tmp_path / "a.jsonl", rows)
    with pytest.raises(RequestError, match=told):
        read_questions(source, format, tokenizer, key="data")


def test_a_field_parts_a_source(tokenizer, tmp_path):
    rows = [{"text": "the cat sat", "n": n % 3, "list": [n]} for n in range(7)]
    source = source_of(tmp_path / "a.jsonl", rows)
    store = tokenize(source, "text", tokenizer, seq_len=8)
    parts = parts_of(store, "n", "--by")
    assert {name: part.chosen.tolist() for name, part in parts.items()} == {
        "0": [0, 3, 6], "1": [1, 4], "2": [2, 5],
    }  # fmt: skip
    part = parts["2"]
    assert len(part) == 2 and (part.example(1)[0] == store.example(5)[0]).all()
    assert part.room(3).tolist() == store.room(3)[[2, 5]].tolist()
    with pytest.raises(RequestError, match=r"a.jsonl:1: --by: the record has no field 'm'"):
        parts_of(store, "m", "--by")
    with pytest.raises(RequestError, match=r"a.jsonl:1: --by: the record has no text or number in"):
        parts_of(store, "list", "--by")
    many = [{"text": "the cat sat", "n": n} for n in range(MOST + 1)]
    store = tokenize(source_of(tmp_path / "b.jsonl", many), "text", tokenizer, seq_len=8)
    with pytest.raises(RequestError, match=f"--by: 'n' has {MOST + 1} values, more than {MOST}"):
        parts_of(store, "n", "--by")
