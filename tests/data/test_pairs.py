"""Examples of several completions: tokenised once, cut alike, written into rows."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from jaxtune.core.errors import RequestError
from jaxtune.data.batches import empty_batch, eval_batches, placed_batches
from jaxtune.data.chat import render_chat, render_completion
from jaxtune.data.sources import Source
from jaxtune.data.store import tokenize
from jaxtune.data.stream import Stream
from jaxtune.data.tokenizer import Tokenizer
from tests.data.conftest import TEMPLATES

EOS = 1


def source_of(records) -> Source:
    records = list(records)
    return Source("memory", len(records), records.__getitem__, lambda i: f"memory:{i + 1}")


@pytest.fixture(scope="module")
def words() -> Tokenizer:
    """The word wI is token I; each text is closed by EOS = 1."""
    vocabulary = {"<unk>": 0, "</s>": EOS} | {f"w{i}": i for i in range(2, 90)}
    backend = Backend(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>"))


def written(*numbers: int) -> str:
    return "".join(f" w{i}" for i in numbers)


def pair(prompt, chosen, rejected, **more):
    return {
        "prompt": written(*prompt), "chosen": written(*chosen), "rejected": written(*rejected),
    } | more  # fmt: skip


ONE = pair([2, 3], [4], [5, 6], margin=0.5, weight=2)
TWO = pair([7], [8, 9], [4])


def rows(batch) -> dict[str, list]:
    return {name: array[0].tolist() for name, array in batch.items()}


def test_a_pair_is_two_segments_of_a_row(words):
    store = tokenize(source_of([ONE]), "preference", words, seq_len=12)
    assert store.keys == ("completions", "example_weight", "margin")
    assert rows(next(eval_batches(store, 1, 12))) == {
        "input_ids": [2, 3, 4, EOS, 2, 3, 5, 6, EOS, 0, 0, 0],
        "loss_mask": [0, 0, 1, 1, 0, 0, 1, 1, 1, 0, 0, 0],
        "segment_ids": [1, 1, 1, 1, 2, 2, 2, 2, 2, 0, 0, 0],
        "positions": [0, 1, 2, 3, 0, 1, 2, 3, 4, 0, 0, 0],
        "completions": [0, 0, 1, 1, 0, 0, 2, 2, 2, 0, 0, 0],
        "example_weight": [0, 0, 2, 2, 0, 0, 2, 2, 2, 0, 0, 0],
        "margin": [0, 0, 0.5, 0.5, 0, 0, 0.5, 0.5, 0.5, 0, 0, 0],
    }


def test_packed_pairs_share_their_prompts(words):
    """The last token of a prompt is written in front of each completion, which it predicts."""
    store = tokenize(source_of([ONE, TWO]), "preference", words, seq_len=16, shared=True)
    assert store.room(0).tolist() == [8, 7]
    stream = Stream([store], seq_len=16, packing=True, shuffle=False)
    assert stream.rows_per_epoch(0) == 1 and stream.keys == store.keys
    row = {name: array.tolist() for name, array in stream.row(0).items()}
    assert row == {
        "input_ids": [2, 3, 4, EOS, 3, 5, 6, EOS, 7, 8, 9, EOS, 7, 4, EOS, 0],
        "loss_mask": [0, 0, 1, 1, 0, 1, 1, 1, 0, 1, 1, 1, 0, 1, 1, 0],
        "segment_ids": [1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 0],
        "positions": [0, 1, 2, 3, 1, 2, 3, 4, 0, 1, 2, 3, 0, 1, 2, 0],
        "completions": [0, 0, 1, 1, 0, 2, 2, 2, 0, 3, 3, 3, 0, 4, 4, 0],
        "branches": [0, 1, 1, 1, 2, 2, 2, 2, 1, 1, 1, 1, 2, 2, 2, 0],
        "example_weight": [0, 0, 2, 2, 0, 2, 2, 2, 0, 1, 1, 1, 0, 1, 1, 0],
        "margin": [0, 0, 0.5, 0.5, 0, 0.5, 0.5, 0.5, *[0] * 8],
    }
    assert stream.most_completions >= 4
    # Held-out rows hold one pair, its prompt shared too.
    (held_out, _) = eval_batches(store, 1, 8)
    assert rows(held_out)["branches"] == [0, 1, 1, 1, 2, 2, 2, 2]


def test_virtual_tokens_begin_each_segment(words):
    def row(shared):
        store = tokenize(
            source_of([ONE]), "preference", words, seq_len=13, num_virtual=2, shared=shared
        )
        assert store.room(2).tolist() == [10 if shared else 13]
        return rows(next(eval_batches(store, 1, 13, 2)))

    apart, together = row(False), row(True)
    assert apart["virtual"] == [0, 1, -1, -1, -1, -1, 0, 1, -1, -1, -1, -1, -1]
    assert apart["positions"] == [*range(6), *range(7)]
    assert apart["completions"] == [0, 0, 0, 0, 1, 1, 0, 0, 0, 0, 2, 2, 2]
    assert together["virtual"] == [0, 1, *[-1] * 11]
    assert together["branches"] == [0, 0, 0, 1, 1, 1, 2, 2, 2, 2, 0, 0, 0]
    assert together["positions"] == [0, 1, 2, 3, 4, 5, 3, 4, 5, 6, 0, 0, 0]


def test_ranked_lists_unpaired_answers_and_steps(words):
    record = {"prompt": written(2), "completions": [written(3), written(4), written(5)]}
    judged = {"scores": [1, 2, 3], "margin": 0.5, "weight": 2}
    store = tokenize(
        source_of([record | judged, record]), "ranked", words, seq_len=18,
        shared=True,
    )  # fmt: skip
    row = Stream([store], seq_len=18, packing=True, shuffle=False).row(0)
    assert row["input_ids"].tolist() == [2, 5, 1, 2, 4, 1, 2, 3, 1, 2, 3, 1, 2, 4, 1, 2, 5, 1]
    assert row["completions"].tolist() == [0, 1, 1, 0, 2, 2, 0, 3, 3, 0, 4, 4, 0, 5, 5, 0, 6, 6]
    assert row["groups"].tolist() == [0, 1, 1] * 3 + [0, 2, 2] * 3
    assert row["margin"].tolist() == [0, 0.5, 0.5] * 3 + [0] * 9
    assert row["example_weight"].tolist() == [0, 2, 2] * 3 + [0, 1, 1] * 3
    assert row["branches"].tolist() == [1, 1, 1, 2, 2, 2, 3, 3, 3] * 2

    records = [
        {"prompt": written(2), "completion": written(3), "label": True, "weight": 3},
        {"prompt": written(2), "completion": written(4), "label": False},
    ]
    store = tokenize(source_of(records), "unpaired", words, seq_len=8, shared=True)
    row = Stream([store], seq_len=8, packing=True, shuffle=False).row(0)
    assert row["segment_ids"].tolist() == [1, 1, 1, 2, 2, 2, 0, 0]
    assert row["completions"].tolist() == [0, 1, 1, 0, 2, 2, 0, 0]
    assert row["label"].tolist() == [0, 1, 1, 0, 0, 0, 0, 0]
    assert row["example_weight"].tolist() == [0, 3, 3, 0, 1, 1, 0, 0]

    split = tokenize(source_of([ONE]), "preference", words, seq_len=8, split_pairs=True)
    assert split.keys == ("completions", "example_weight", "label") and len(split) == 2
    assert [split.where(i) for i in range(2)] == ["memory:1", "memory:1"]
    labels = [rows(b)["label"] for b in eval_batches(split, 1, 5)]
    assert labels == [[0, 0, 1, 1, 0], [0, 0, 0, 0, 0]]

    record = {"prompt": written(2), "completions": [written(3, 4), written(5)], "labels": [1, 0.5]}
    store = tokenize(source_of([record]), "stepwise", words, seq_len=6)
    row = rows(next(eval_batches(store, 1, 6)))
    assert row["input_ids"] == [2, 3, 4, 5, 0, 0]
    assert row["loss_mask"] == [0, 0, 1, 1, 0, 0]
    assert row["completions"] == [0, 0, 1, 2, 0, 0]
    assert row["label"] == [0, 0, 1, 0.5, 0, 0]


def test_completions_are_cut_alike(words):
    def kept(seq_len, **options):
        store = tokenize(
            source_of([pair([2, 3], [4], [5, 6, 7, 8]), TWO]), "preference", words,
            seq_len=seq_len, **options,
        )  # fmt: skip
        return store, store.counts

    with pytest.raises(RequestError, match="11 tokens, more than seq_len 10") as error:
        kept(10)
    assert error.value.where == "memory:1"
    store, counts = kept(10, overlong="truncate")
    assert store.example(0)[0].tolist() == [2, 3, 4, EOS, 5, 6, 7, 8]
    assert (counts.truncated, counts.tokens_truncated, counts.dropped) == (1, 1, 0)
    store, counts = kept(8, overlong="truncate", shared=True)
    assert store.example(0)[0].tolist() == [2, 3, 4, EOS, 5, 6, 7]
    store, counts = kept(6, overlong="truncate")  # each side of the first pair would keep one
    assert store.example(0)[0].tolist() == [2, 3, 4, 5]
    assert store.example(1)[0].tolist() == [7, 8, 9, 4, EOS]
    store, counts = kept(5, overlong="truncate")  # the prompt alone of the first pair
    assert len(store) == 1 and store.records.tolist() == [1] and counts.dropped == 1
    assert store.example(0)[0].tolist() == [7, 8, 4]
    # The model's positions are for each text by itself: a prompt with one of its completions.
    store, counts = kept(12, context=7)
    assert counts.truncated == counts.dropped == 0
    with pytest.raises(RequestError, match="7 positions with its prompt, more than the model's 6"):
        kept(12, context=6)
    store, counts = kept(12, context=6, overlong="truncate")
    assert store.example(0)[0].tolist() == [2, 3, 4, EOS, 5, 6, 7, 8]
    store, counts = kept(12, context=6, overlong="drop")
    assert store.records.tolist() == [1] and counts.dropped == 1
    store, counts = kept(10, overlong="drop")
    assert len(store) == 1 and (counts.dropped, counts.tokens_dropped) == (1, 9)


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.tuples(*[st.integers(1, 6)] * 3), min_size=1, max_size=12),
    overlong=st.sampled_from(["drop", "truncate"]),
    shared=st.booleans(),
    virtual=st.integers(0, 2),
)
def test_nothing_is_lost_in_silence(words, sizes, overlong, shared, virtual):
    records = [pair(range(2, 2 + p), range(20, 20 + a), range(40, 40 + b)) for p, a, b in sizes]
    try:
        store = tokenize(
            source_of([*records, TWO]), "preference", words, seq_len=18, overlong=overlong,
            shared=shared, num_virtual=virtual,
        )  # fmt: skip
    except RequestError:
        pytest.fail("the last pair fits")
    counts = store.counts
    total = counts.tokens_kept + counts.tokens_dropped + counts.tokens_truncated
    assert total == counts.tokens_in == sum(p + a + b + 2 for p, a, b in [*sizes, (1, 2, 1)])
    assert counts.examples + counts.dropped == counts.records
    stream = Stream([store], seq_len=18, packing=shared, num_virtual=virtual)
    seen, completions, targets = [], 0, 0
    for index in range(stream.rows_per_epoch(0)):
        row = stream.row(index)
        trained = row["completions"] > 0
        assert ((row["loss_mask"] > 0) == trained).all()
        seen += row["input_ids"][trained].tolist()
        completions = max(completions, int(row["completions"].max()))
        targets = max(targets, int(trained.sum()))
        assert row["completions"].max() == 2 * len(stream.examples_of_row(index))
    assert completions <= stream.most_completions
    assert targets <= stream.most_targets <= 18
    if not shared:
        assert targets == stream.most_targets
    assert sorted(seen) == sorted(store.ids[store.mask > 0].tolist())
    assert len(seen) == counts.trained_tokens


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("virtual", [0, 2])
def test_a_column_goes_to_each_token_and_back(words, shared, virtual):
    records = [ONE, TWO, pair([2], [3, 4, 5], [6])]
    source = source_of(records)
    options = {"seq_len": 16, "num_virtual": virtual, "shared": shared}
    store = tokenize(source, "preference", words, **options)
    known = np.random.default_rng(0).normal(size=len(store.ids)).astype(np.float32)
    filled = np.full(len(store.ids), np.nan, np.float32)
    scored = store.with_column("ref_logprobs", known)
    assert scored.keys == (*store.keys, "ref_logprobs")
    assert scored.fingerprint() == store.fingerprint()
    for batch, places in placed_batches(scored, 2, 16, virtual):
        here = places >= 0
        np.testing.assert_array_equal(batch["input_ids"][here], store.ids[places[here]])
        np.testing.assert_array_equal(batch["ref_logprobs"][here], known[places[here]])
        assert (batch["ref_logprobs"][~here] == 0).all()
        filled[places[here]] = batch["ref_logprobs"][here]
    np.testing.assert_array_equal(filled, known)
    head = scored.head(2)
    assert head.keys == scored.keys and len(head.example_columns(1)["ref_logprobs"]) == 6
    plain = Stream([store], seq_len=16, packing=shared, num_virtual=virtual)
    stream = plain.with_column("ref_logprobs", [known])
    assert stream.fingerprint() == plain.fingerprint()
    assert stream.keys == scored.keys == tuple(stream.empty_batch(1))[-len(scored.keys) :]


def test_stores_without_columns_take_one_too():
    records = [{"input_ids": [3, 4, 5]}, {"input_ids": [6, 7]}]
    store = tokenize(source_of(records), "tokens", None, seq_len=4)
    known = np.arange(5, dtype=np.float32)
    stream = Stream([store.with_column("ref_logprobs", known)], seq_len=8, packing=True)
    row = stream.row(0)
    order = {3: 0, 4: 1, 5: 2, 6: 3, 7: 4}
    for token, value in zip(row["input_ids"], row["ref_logprobs"], strict=True):
        assert value == order.get(int(token), 0)
    with pytest.raises(ValueError, match="5 tokens"):
        store.with_column("ref_logprobs", np.zeros(4, np.float32))


@pytest.mark.parametrize("name", TEMPLATES)
def test_each_side_is_tokenised_once_and_they_share_the_prompt(name, chat):
    """C22: a side is what the renderer of conversations gives for the whole of it."""
    tokenizer = chat(name)
    before = [
        {"role": "user", "content": "Hello there"},
        {"role": "assistant", "content": "How are you?"},
        {"role": "user", "content": "What is the capital of France?"},
    ]
    answers = ["Paris.", "Once upon a time\nthe moon"]
    records = [{"prompt": before, "chosen": answers[0], "rejected": answers[1]}]
    store = tokenize(source_of(records), "preference", tokenizer, seq_len=400)
    (batch,) = eval_batches(store, 1, 400)
    columns = store.example_columns(0)
    prompt = store.ids[columns["branches"] == 0]
    assert len(prompt) > 5
    for side, answer in enumerate(answers, 1):
        talk = [*before, {"role": "assistant", "content": answer}]
        want = render_chat(talk, tokenizer)
        here = batch["segment_ids"][0] == side
        np.testing.assert_array_equal(batch["input_ids"][0][here], want.ids)
        np.testing.assert_array_equal(want.ids[: len(prompt)], prompt)
        # Only the last turn is trained.
        got, whole = batch["loss_mask"][0][here], want.mask
        last = np.flatnonzero(np.diff(whole, prepend=0) > 0)[-1]
        np.testing.assert_array_equal(got, np.where(np.arange(len(whole)) >= last, whole, 0))


def test_a_merge_across_the_boundary_starts_both_sides_earlier(tokenizer):
    """ " the" is one token: behind "sat on ", "the" is merged with the space, and "2" is not."""
    record = {"prompt": "The cat sat on ", "chosen": "the mat", "rejected": "2"}
    store = tokenize(source_of([record]), "preference", tokenizer, seq_len=64)
    (batch,) = eval_batches(store, 1, 64)
    sides = [
        render_completion(record["prompt"], record[n], tokenizer) for n in ("chosen", "rejected")
    ]
    prompt = store.ids[store.columns["branches"] == 0]
    assert tokenizer.decode(prompt).endswith("sat on")
    for number, side in enumerate(sides, 1):
        here = batch["segment_ids"][0] == number
        np.testing.assert_array_equal(batch["input_ids"][0][here], side.ids)
        mask = batch["loss_mask"][0][here]
        assert mask.tolist() == [0.0] * len(prompt) + [1.0] * (len(side.ids) - len(prompt))
    apart = sides[1].mask.tolist()
    assert apart.count(0.0) == len(prompt) + 1  # alone, the space would be context


def test_formats_mix_in_a_stream(words):
    options = {"seq_len": 16}
    pairs = tokenize(source_of([ONE]), "preference", words, **options)
    record = {"prompt": written(2), "completions": [written(3), written(4), written(5)]}
    lists = tokenize(source_of([record]), "ranked", words, **options)
    stream = Stream([pairs, lists], shuffle=False, **options)
    assert stream.keys == ("completions", "example_weight", "margin", "groups")
    both = [stream.row(i) for i in range(2)]
    assert both[0]["groups"].max() == 1 and both[0]["margin"].max() == 0.5
    assert both[1]["completions"].max() == 3 == stream.most_completions
    assert both[1]["margin"].max() == 0
    assert empty_batch(1, 4, keys=stream.keys).keys() == both[0].keys()
