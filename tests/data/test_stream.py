"""Streams: the rows of a run, the same for any batching, host or restart."""

from __future__ import annotations

import json
from collections import Counter
from itertools import chain

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxtune.core.errors import RequestError
from jaxtune.data.batches import eval_batches
from jaxtune.data.sources import Source
from jaxtune.data.store import TokenStore, tokenize
from jaxtune.data.stream import Stream

KEYS = {"input_ids", "loss_mask", "segment_ids", "positions"}


def store_of(lengths, first: int = 0, seq_len: int = 16) -> TokenStore:
    """Example i is [first + i] * n, so that a token says which example it is of."""
    records = [{"input_ids": [first + i] * n} for i, n in enumerate(lengths)]
    source = Source("memory", len(records), records.__getitem__, lambda i: f"memory:{i + 1}")
    return tokenize(source, "tokens", None, seq_len=seq_len)


def lengths_for(n: int, longest: int = 12) -> list[int]:
    return np.random.default_rng(n).integers(2, longest + 1, n).tolist()


def seen(batches) -> Counter:
    """How often each example occurs: in rows and segments."""
    out: Counter = Counter()
    for batch in batches:
        for ids, segments in zip(batch["input_ids"], batch["segment_ids"], strict=True):
            for segment in range(1, segments.max(initial=0) + 1):
                out[int(ids[segments == segment][0])] += 1
    return out


def same(one, two) -> None:
    assert one.keys() == two.keys()
    for name in one:
        assert one[name].dtype == two[name].dtype
        np.testing.assert_array_equal(one[name], two[name], err_msg=name)


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 40), virtual=st.integers(0, 3), packing=st.booleans(), shuffle=st.booleans(),
)  # fmt: skip
def test_rows_are_well_formed(n, virtual, packing, shuffle):
    store = store_of(lengths_for(n), first=1)
    stream = Stream(
        [store], seq_len=16, packing=packing, shuffle=shuffle, seed=n, num_virtual=virtual
    )
    for index in range(stream.rows_per_epoch(0)):
        row = stream.row(index)
        assert set(row) == (KEYS | {"virtual"} if virtual else KEYS)
        members = stream.examples_of_row(index)
        assert packing or len(members) == 1
        at = 0
        for segment, (_, example) in enumerate(members, 1):
            ids, mask = store.example(example)
            end = at + virtual + len(ids)
            assert (row["segment_ids"][at:end] == segment).all()
            assert row["positions"][at:end].tolist() == list(range(end - at))
            np.testing.assert_array_equal(row["input_ids"][at:end], [0] * virtual + ids.tolist())
            np.testing.assert_array_equal(row["loss_mask"][at:end], [0] * virtual + mask.tolist())
            if virtual:
                expected = [*range(virtual), *[-1] * len(ids)]
                assert row["virtual"][at:end].tolist() == expected
            at = end
        for name, array in row.items():
            assert array.shape == (16,)
            assert (array[at:] == (-1 if name == "virtual" else 0)).all()
            assert array.dtype == (np.float32 if name == "loss_mask" else np.int32)


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("shuffle", [False, True])
def test_an_epoch_has_each_example_once(packing, shuffle):  # C12
    store = store_of(lengths_for(37))
    stream = Stream([store], seq_len=16, packing=packing, shuffle=shuffle, seed=1)
    budget = stream.budget(total_epochs=2, batch_size=4)
    batches = list(stream.batches(4, budget.steps, row_limit=budget.rows))
    assert seen(batches) == Counter({i: 2 for i in range(37)})
    assert sum(int((b["segment_ids"] > 0).sum()) for b in batches) == 2 * store.counts.tokens_kept
    stats = stream.stats()
    assert stats["tokens_per_epoch"] == store.counts.tokens_kept
    assert stats["examples_per_epoch"] == 37
    if packing:
        assert stats["rows_per_epoch"] < 37 and stats["efficiency"] > 0.8
    if not shuffle and not packing:
        assert [int(b["input_ids"][0, 0]) for b in batches][:3] == [0, 4, 8]


def test_epochs_differ_when_shuffled():
    stream = Stream([store_of(lengths_for(37))], seq_len=16, packing=True, seed=1)
    first = [stream.examples_of_row(r) for r in range(stream.rows_per_epoch(0))]
    start = stream.rows_per_epoch(0)
    second = [stream.examples_of_row(start + r) for r in range(stream.rows_per_epoch(1))]
    assert first != second
    assert sorted(chain(*first)) == sorted(chain(*second))


def test_a_mixture_keeps_its_weights_and_sees_everything():
    stores = [store_of(lengths_for(30)), store_of(lengths_for(5), first=100)]
    stream = Stream(stores, [3.0, 1.0], seq_len=16, packing=True, seed=0)
    budget = stream.budget(total_epochs=1, batch_size=4)
    counts = seen(stream.batches(4, budget.steps, row_limit=budget.rows))
    assert set(counts) == {*range(30), *range(100, 105)}
    assert max(counts[i] for i in range(30)) == 1
    assert sum(counts[i] for i in range(100, 105)) == 9  # 30 + 9 is the shortest


@pytest.mark.parametrize("packing", [False, True])
def test_durations(packing):
    store = store_of(lengths_for(37))
    stream = Stream([store], seq_len=16, packing=packing, seed=1)
    rows = stream.rows_per_epoch(0)
    assert stream.steps(total_steps=7, batch_size=4) == 7
    assert stream.steps(total_epochs=1, batch_size=4) == -(-rows // 4)
    assert stream.steps(total_epochs=1.0, batch_size=1) == rows
    assert stream.steps(total_epochs=0.5, batch_size=1) == -(-rows // 2)
    assert stream.steps(total_epochs=1e-6, batch_size=4) == 1

    total, sizes = 0, []
    for row in range(3 * rows):
        total += len(stream.examples_of_row(row))
        sizes.append(total)
    for examples in (1, 36, 37, 38, 74):
        budget = stream.budget(total_examples=examples, batch_size=1)
        assert (
            budget.steps == budget.rows == 1 + next(i for i, n in enumerate(sizes) if n >= examples)
        )
    tokens = np.cumsum([(stream.row(r)["segment_ids"] > 0).sum() for r in range(3 * rows)])
    for amount in (1, 100, int(tokens[rows - 1]), int(tokens[rows - 1]) + 1):
        expected = 1 + int(np.flatnonzero(tokens >= amount)[0])
        assert stream.steps(total_tokens=amount, batch_size=1) == expected
        assert stream.steps(total_tokens=amount, batch_size=3) == -(-expected // 3)
        assert stream.budget(total_tokens=amount, batch_size=3).rows is None


def test_durations_must_be_one_and_positive():
    stream = Stream([store_of([3])], seq_len=16)
    for bad in ({}, {"total_steps": 1, "total_epochs": 1}):
        with pytest.raises(RequestError, match="exactly one"):
            stream.steps(batch_size=1, **bad)
    with pytest.raises(RequestError, match="not positive") as error:
        stream.steps(batch_size=1, total_epochs=0)
    assert error.value.key == "total_epochs"


def test_virtual_tokens_are_not_counted_as_tokens():
    stream = Stream([store_of([4, 4], seq_len=6)], seq_len=6, num_virtual=2)
    assert stream.stats()["tokens_per_epoch"] == 8 and stream.stats()["efficiency"] == 1.0
    assert stream.steps(total_tokens=8, batch_size=1) == 2


@pytest.mark.parametrize("packing", [False, True])
def test_batches_do_not_depend_on_how_hosts_share_them(packing):  # C32
    def stream():
        return Stream([store_of(lengths_for(37))], seq_len=16, packing=packing, seed=5)

    whole = list(stream().batches(6, 9))
    assert len(whole) == 9
    halves = [list(stream().batches(6, 9, rows=slice(a, a + 3))) for a in (0, 3)]
    for batch, top, bottom in zip(whole, *halves, strict=True):
        same(batch, {k: np.concatenate([top[k], bottom[k]]) for k in batch})
    rows = [stream().row(i) for i in range(54)]
    same(whole[4], {k: np.stack([r[k] for r in rows[24:30]]) for k in rows[0]})
    smaller = list(stream().batches(3, 18))
    same(whole[2], {k: np.concatenate([smaller[4][k], smaller[5][k]]) for k in whole[2]})


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("stop", [0, 1, 5, 13, 19, 20])
def test_a_restored_position_continues_exactly(packing, stop):  # C26
    def stream():
        stores = [store_of(lengths_for(11)), store_of(lengths_for(5), first=100)]
        return Stream(stores, [2, 1], seq_len=16, packing=packing, seed=9)

    whole = list(stream().batches(3, 20))  # several epochs
    broken = stream().batches(3, 20)
    for _ in range(stop):
        next(broken)
    state = json.loads(json.dumps(broken.get_state()))
    restored = stream().batches(3, 20)
    restored.set_state(state)
    rest = list(restored)
    assert len(rest) == 20 - stop
    for one, two in zip(whole[stop:], rest, strict=True):
        same(one, two)
    restored.set_state({"next_step": 0})  # and back again
    same(next(restored), whole[0])
    for one, two in zip(whole[stop:], stream().batches(3, 20, start=stop), strict=True):
        same(one, two)


def test_a_position_outside_the_run_is_refused():
    batches = Stream([store_of([3])], seq_len=16).batches(1, 4)
    with pytest.raises(ValueError, match=r"0\.\.4"):
        batches.set_state({"next_step": 5})
    assert len(list(batches)) == 4


def test_the_last_batch_of_the_last_epoch_ends_with_empty_rows():
    store = store_of(lengths_for(10))
    stream = Stream([store], seq_len=16, seed=0, num_virtual=2)
    budget = stream.budget(total_epochs=1, batch_size=4)
    last = list(stream.batches(4, budget.steps, row_limit=budget.rows))[-1]
    assert (last["segment_ids"].max(axis=1) > 0).tolist() == [True, True, False, False]
    for name, array in last.items():
        assert (array[2:] == (-1 if name == "virtual" else 0)).all()


def test_large_epochs_are_planned_in_blocks(monkeypatch):
    import jaxtune.data.stream as module

    store = store_of(lengths_for(50))
    monkeypatch.setattr(module, "_BLOCK", 8)
    for packing in (False, True):
        stream = Stream([store], seq_len=16, packing=packing, seed=1)
        budget = stream.budget(total_epochs=3, batch_size=4)
        batches = list(stream.batches(4, budget.steps, row_limit=budget.rows))
        assert seen(batches) == Counter({i: 3 for i in range(50)})
        assert sum(stream.rows_per_epoch(e) for e in range(3)) == budget.rows


def test_evaluation_reads_in_order_and_once():  # C3, C33
    store = store_of(lengths_for(10))
    for batch_size in (1, 3, 4, 16):
        batches = list(eval_batches(store, batch_size, 16, num_virtual=1))
        assert seen([{k: b[k][:, 1:] for k in b} for b in batches]) == Counter(range(10))
        assert all(b["input_ids"].shape == (batch_size, 16) for b in batches)
        total = sum(float(b["loss_mask"].sum()) for b in batches)
        assert total == store.counts.trained_tokens
    halves = [list(eval_batches(store, 4, 16, rows=slice(a, a + 2))) for a in (0, 2)]
    for whole, top, bottom in zip(eval_batches(store, 4, 16), *halves, strict=True):
        same(whole, {k: np.concatenate([top[k], bottom[k]]) for k in whole})


def test_the_target_of_a_position_is_the_next_token():  # C10, the data's side
    records = [{"input_ids": [5, 6, 7, 8, 9], "loss_mask": [1, 0, 0, 1, 1]}]
    source = Source("memory", 1, records.__getitem__, str)
    row = Stream([tokenize(source, "tokens", None, seq_len=8)], seq_len=8).row(0)
    # logits[t - 1] predict input_ids[t], which counts loss_mask[t]
    predicted = [
        (row["input_ids"][t - 1], row["input_ids"][t]) for t in np.flatnonzero(row["loss_mask"])
    ]
    assert predicted == [(7, 8), (8, 9)]
    assert row["loss_mask"].tolist() == [0, 0, 0, 1, 1, 0, 0, 0]


def test_the_fingerprint_sees_what_decides_the_rows():
    def make(lengths=(3, 4), **kwargs):
        return Stream([store_of(lengths)], **({"seq_len": 16, "seed": 0} | kwargs)).fingerprint()

    assert make() == make()
    others = [make(seed=1), make(packing=True), make(shuffle=False), make((4, 3)), make(seq_len=17)]
    assert len({make(), *others}) == 6


def test_an_example_that_does_not_fit_is_an_error():
    with pytest.raises(ValueError, match="14 tokens of 13"):
        Stream([store_of([12])], seq_len=13, num_virtual=2)
