"""Prompts of online runs: rendered to where generation starts, in an order that goes on."""

from __future__ import annotations

import numpy as np
import pytest

from jaxtune.core.errors import RequestError
from jaxtune.data.chat import render_prompt
from jaxtune.data.prompts import Prompts, read_prompts
from jaxtune.data.sources import Source
from jaxtune.data.store import tokenize
from tests.data.conftest import TEMPLATES

ASK = [{"role": "user", "content": "What is the capital of France?"}]


def source_of(records) -> Source:
    records = list(records)
    return Source("memory", len(records), records.__getitem__, lambda i: f"memory:{i + 1}")


def numbered(count: int, start: int = 0) -> Source:
    return source_of({"prompt": f"The cat {start + i}", "answer": start + i} for i in range(count))


@pytest.mark.parametrize("name", TEMPLATES)
def test_messages_end_where_generation_starts(name, chat):
    tokenizer = chat(name)
    store = read_prompts(source_of([{"prompt": ASK}]), tokenizer, max_prompt=100)
    assert store.ids.tolist() == render_prompt(ASK, tokenizer)
    assert tokenizer.encode(store.texts[0], special=False) == store.ids.tolist()
    pair = {"prompt": ASK, "chosen": "Paris.", "rejected": "Once upon"}
    pairs = tokenize(source_of([pair]), "preference", tokenizer, seq_len=200)
    # What pairs share of a prompt is where generation starts, or a part of it: a template's
    # generation prompt may open a block that finished turns do not have.
    shared = pairs.ids[pairs.columns["branches"] == 0].tolist()
    assert shared == store.ids.tolist()[: len(shared)]


def test_strings_and_their_columns(tokenizer):
    records = [
        {"prompt": "The cat", "answer": 1, "tags": ["a", {"b": None}]},
        {"instruction": "Add", "input": "1 1", "answer": 2},
    ]
    prompts = Prompts((read_prompts(source_of(records), tokenizer, max_prompt=200),))
    assert len(prompts) == 2 and prompts.epoch == 2
    assert prompts.ids(0).tolist() == tokenizer.encode("The cat")
    assert prompts.text(1).endswith("### Response:\n")
    assert prompts.longest == len(prompts.ids(1))
    assert prompts.columns([1, 0, 1]) == {
        "answer": [2, 1, 2],
        "tags": [None, ["a", {"b": None}], None],
        "instruction": ["Add", None, "Add"],
        "input": ["1 1", None, "1 1"],
    }
    assert prompts.where(1) == "memory:2"


def test_an_iteration_follows_from_the_seed_and_its_number(tokenizer):
    def make(seed=3, weights=(2.0, 1.0), last=4):
        stores = [
            read_prompts(numbered(n, s), tokenizer, max_prompt=50) for n, s in ((10, 0), (last, 50))
        ]
        return Prompts(tuple(stores), weights, seed=seed)

    prompts = make()
    taken = prompts.take(0, 60)
    assert [prompts.take(6 * i, 6) for i in range(10)] == [taken[6 * i :][:6] for i in range(10)]
    assert make().take(24, 6) == taken[24:30]
    assert set(prompts.take(0, prompts.epoch)) == set(range(14))
    first = np.array(taken) < 10
    assert abs(first.mean() - 2 / 3) < 0.05
    assert sorted(np.array(taken)[first][:10]) == list(range(10))
    assert prompts.columns(taken[:3])["answer"] == [n if n < 10 else n + 40 for n in taken[:3]]
    assert make(seed=4).take(0, 60) != taken
    same, others = make(), (make(seed=4), make(weights=(1.0, 1.0)), make(last=5))
    assert prompts.fingerprint() == same.fingerprint()
    assert len({p.fingerprint() for p in (prompts, *others)}) == 4


def test_the_fingerprint_sees_the_columns(tokenizer):
    def print_of(answer):
        source = source_of([{"prompt": "a", "answer": answer}])
        return read_prompts(source, tokenizer, max_prompt=9).fingerprint()

    assert print_of(1) == print_of(1) != print_of(2)


def test_long_prompts_are_refused_or_left_out(tokenizer):
    records = [{"prompt": "The cat"}, {"prompt": "The cat sat on the mat and looked at the moon"}]
    with pytest.raises(RequestError, match=r"tokens, more than 4: raise data\.max_prompt") as error:
        read_prompts(source_of(records), tokenizer, max_prompt=4, key="data.train[0]")
    assert (error.value.where, error.value.key) == ("memory:2", "data.train[0]")
    store = read_prompts(source_of(records), tokenizer, max_prompt=4, overlong="drop")
    counts = store.counts
    assert (len(store), counts.prompts, counts.dropped) == (1, 1, 1)
    assert counts.tokens_in == counts.tokens_kept + counts.tokens_dropped
    assert store.records.tolist() == [0]
    with pytest.raises(RequestError, match="all 2 prompts are longer"):
        read_prompts(source_of(records), tokenizer, max_prompt=1, overlong="drop")
    with pytest.raises(RequestError, match="unknown overlong 'truncate'"):
        read_prompts(source_of(records), tokenizer, max_prompt=1, overlong="truncate")


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"question": "a"}, "no field 'prompt'"),
        ({"prompt": " "}, "'prompt' is empty"),
        ({"prompt": None}, "'prompt' must be a string"),
        ({"prompt": ASK}, "no chat template"),
        ({"prompt": [*ASK, {"role": "assistant", "content": "a"}]}, "is the assistant's"),
    ],
)
def test_bad_prompts_are_named(tokenizer, record, words):
    with pytest.raises(RequestError, match=words) as error:
        read_prompts(source_of([{"prompt": "a"}, record]), tokenizer, max_prompt=9)
    assert error.value.where == "memory:2"


def test_prompts_are_not_trained_on(tokenizer):
    with pytest.raises(RequestError, match="nothing to train on"):
        tokenize(numbered(1), "prompt", tokenizer, seq_len=9)
