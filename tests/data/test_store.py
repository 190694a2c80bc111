"""Stores: nothing is lost or cut in silence, and each bad example is named."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxtune.core.errors import RequestError
from jaxtune.data.chat import ROLE_NAMES, render_chat, render_completion
from jaxtune.data.sources import Source, open_source
from jaxtune.data.store import tokenize


def source_of(records) -> Source:
    records = list(records)
    return Source("memory", len(records), records.__getitem__, lambda i: f"memory:{i + 1}")


def ids_source(lengths) -> Source:
    """Example i holds i, i+1, ..."""
    return source_of({"input_ids": [i + j for j in range(n)]} for i, n in enumerate(lengths))


def balanced(counts) -> bool:
    total = counts.tokens_kept + counts.tokens_dropped + counts.tokens_truncated
    return total == counts.tokens_in


def test_examples_are_those_of_the_renderer(tokenizer, chat, tmp_path, write_jsonl):
    records = [{"prompt": f"Q{i}?", "completion": f" {'x ' * i}end"} for i in range(1, 6)]
    source = open_source(write_jsonl(tmp_path / "a.jsonl.gz", records))
    store = tokenize(source, "completion", tokenizer, seq_len=64)
    assert len(store) == 5
    for i, record in enumerate(records):
        expected = render_completion(record["prompt"], record["completion"], tokenizer)
        ids, mask = store.example(i)
        np.testing.assert_array_equal(ids, expected.ids)
        np.testing.assert_array_equal(mask, expected.mask)
        assert store.where(i) == f"{tmp_path / 'a.jsonl.gz'}:{i + 1}"
        assert store.lengths[i] == len(ids)
    assert (store.ids.dtype, store.mask.dtype, store.offsets.dtype) == (
        np.int32, np.float32, np.int64,
    )  # fmt: skip
    talk = [{"role": "user", "content": "a\n\nb"}, {"role": "assistant", "content": "c"}]
    store = tokenize(
        source_of([{"instruction": "a", "input": "b", "output": "c"}]),
        "instruction",
        chat("chatml"),
        seq_len=64,
        keep_roles=True,
    )
    expected = render_chat(talk, chat("chatml"))
    np.testing.assert_array_equal(store.example(0)[0], expected.ids)
    np.testing.assert_array_equal(store.example_roles(0), expected.roles)
    assert "assistant" in {ROLE_NAMES[c] for c in store.example_roles(0)}


def test_too_long_is_an_error_that_says_what_to_do():  # C13
    with pytest.raises(RequestError) as error:
        tokenize(ids_source([3, 9, 3]), "tokens", None, seq_len=10, num_virtual=2, key="data.x")
    assert error.value.where == "memory:2"
    for words in ("9 tokens", "seq_len 10", "2 virtual", "truncate", "drop"):
        assert words in str(error.value)
    assert len(tokenize(ids_source([8]), "tokens", None, seq_len=10, num_virtual=2)) == 1


def test_drop_and_truncate_are_counted():  # C12, C13
    lengths = [3, 12, 8, 20]
    counts = tokenize(ids_source(lengths), "tokens", None, seq_len=8, overlong="drop").counts
    assert (counts.examples, counts.dropped, counts.truncated) == (2, 2, 0)
    assert (counts.tokens_in, counts.tokens_kept, counts.tokens_dropped) == (43, 11, 32)
    store = tokenize(ids_source(lengths), "tokens", None, seq_len=8, overlong="truncate")
    assert (store.counts.examples, store.counts.truncated) == (4, 2)
    assert store.counts.tokens_truncated == 4 + 12 and balanced(store.counts)
    np.testing.assert_array_equal(store.example(1)[0], np.arange(1, 9))


def test_an_example_whose_targets_are_cut_away_is_dropped():  # C13
    late = {"input_ids": list(range(9)), "loss_mask": [0] * 8 + [1]}
    kept = {"input_ids": [1, 2], "loss_mask": [0, 1]}
    store = tokenize(source_of([late, kept]), "tokens", None, seq_len=5, overlong="truncate")
    assert len(store) == 1 and store.where(0) == "memory:2"
    assert (store.counts.dropped, store.counts.tokens_dropped) == (1, 9)
    assert balanced(store.counts)
    with pytest.raises(RequestError, match="dropped"):
        tokenize(source_of([late]), "tokens", None, seq_len=5, overlong="truncate")


def test_examples_without_a_target_are_refused():  # C8, C13
    for record in (
        {"input_ids": [1, 2, 3], "loss_mask": [0, 0, 0]},
        {"input_ids": [1, 2, 3], "loss_mask": [1, 0, 0]},  # the first token has no context
        {"input_ids": [7]},
    ):
        source = source_of([{"input_ids": [1, 2]}, record])
        for overlong in ("error", "drop", "truncate"):
            with pytest.raises(RequestError, match="trained") as error:
                tokenize(source, "tokens", None, seq_len=8, overlong=overlong)
            assert error.value.where == "memory:2"


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(2, 40), min_size=1, max_size=6),
    capacity=st.integers(2, 12),
)
def test_documents_are_cut_into_windows_without_loss(word_tokenizer, lengths, capacity):  # C12
    texts = [" ".join(f"w{(7 * i + j) % 50}" for j in range(n)) for i, n in enumerate(lengths)]
    store = tokenize(
        source_of({"text": t} for t in texts), "text", word_tokenizer, seq_len=capacity
    )
    assert store.lengths.max() <= capacity and store.lengths.min() >= 2
    for record, text in enumerate(texts):
        whole = [*word_tokenizer.encode(text), word_tokenizer.eos_id]
        targets = []
        for example in np.flatnonzero(store.records == record):
            ids, mask = store.example(example)
            assert mask[0] == 0 and mask[1:].all()
            targets += ids[1:].tolist()
        assert targets == whole[1:]  # each token but the first is a target once, in order
    assert balanced(store.counts)
    assert store.counts.trained_tokens == store.counts.tokens_in - len(texts)
    assert store.ids.size == store.counts.tokens_kept + store.counts.tokens_repeated


@pytest.fixture(scope="module")
def word_tokenizer(tmp_path_factory):
    """A word is a token, so that lengths can be chosen."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from jaxtune.data.tokenizer import Tokenizer

    words = {"<unk>": 0, "</s>": 1} | {f"w{i}": i + 2 for i in range(50)}
    backend = Backend(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>"))


def test_ids_outside_the_vocabulary_are_refused():
    source = source_of([{"input_ids": [1, 2]}, {"input_ids": [1, 99]}])
    tokenize(source, "tokens", None, seq_len=8, vocab_size=100)
    with pytest.raises(RequestError, match=r"99, which is not in 0\.\.98") as error:
        tokenize(source, "tokens", None, seq_len=8, vocab_size=99)
    assert error.value.where == "memory:2"
    for bad in (-1, 2**31, 10**30):
        with pytest.raises(RequestError, match="not in"):
            tokenize(source_of([{"input_ids": [1, bad]}]), "tokens", None, seq_len=8)


def test_requests_that_cannot_be(tokenizer):
    source = source_of([{"text": "hello"}])
    with pytest.raises(RequestError, match="needs a tokenizer"):
        tokenize(source, "text", None, seq_len=8)
    with pytest.raises(RequestError, match="did you mean 'truncate'"):
        tokenize(source, "text", tokenizer, seq_len=8, overlong="truncated")
    with pytest.raises(RequestError, match="virtual"):
        tokenize(source, "text", tokenizer, seq_len=8, num_virtual=7)
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    source = source_of([{"messages": messages}])
    with pytest.raises(RequestError, match="no chat template") as error:
        tokenize(source, "chat", tokenizer, seq_len=8, key="data.train[0]")
    assert error.value.where == "memory:1"


def test_weights_are_kept_and_the_fingerprint_sees_them():
    def make(weight):
        record = {"input_ids": [1, 2, 3], "loss_mask": [1, weight, 1]}
        return tokenize(source_of([record]), "tokens", None, seq_len=8)

    assert make(0.25).example(0)[1].tolist() == [0.0, 0.25, 1.0]
    assert make(0.25).fingerprint() == make(0.25).fingerprint() != make(0.5).fingerprint()
    one, two = ids_source([4]), source_of([{"input_ids": [0, 1]}, {"input_ids": [2, 3]}])
    stores = [tokenize(s, "tokens", None, seq_len=8) for s in (one, two)]
    assert stores[0].fingerprint() != stores[1].fingerprint()


def test_the_fingerprint_of_a_source_stays_what_it_was():
    """A run can only be continued on data of the same fingerprint."""
    records = [{"input_ids": [1, 2, 3]}, {"input_ids": [4, 5], "loss_mask": [0, 0.5]}]
    store = tokenize(source_of(records), "tokens", None, seq_len=8)
    assert store.fingerprint() == "d806fcf0d552deb6b7efc16791125c75"


def test_ten_thousand_short_examples_take_seconds(chat):
    records = [
        {"instruction": f"Add {i}", "input": f"{i} {i}", "output": f"It is {2 * i}."}
        for i in range(10_000)
    ]
    start = time.perf_counter()
    store = tokenize(source_of(records), "instruction", chat("chatml"), seq_len=128)
    assert len(store) == 10_000
    assert time.perf_counter() - start < 20  # about 3 s on an idle core


def test_real_instructions(shared):
    from jaxtune.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(shared / "models" / "babyllama105")
    path = shared / "data" / "math" / "gsm8k_train.jsonl.gz"
    source = open_source(f"jsonl:{path}")
    with pytest.raises(RequestError, match="no field 'prompt'") as error:
        tokenize(source, "completion", tokenizer, seq_len=256)
    assert error.value.where == f"{path}:1"
    rows = source_of(
        {"prompt": source[i]["question"], "completion": source[i]["answer"]} for i in range(200)
    )
    store = tokenize(rows, "completion", tokenizer, seq_len=256, overlong="truncate")
    assert balanced(store.counts) and store.counts.truncated + store.counts.dropped > 0
