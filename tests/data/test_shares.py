"""A source in shares is the source: lengths, order, fingerprint and every example."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

from jaxtune.core.errors import RequestError
from jaxtune.data import shares
from jaxtune.data.sources import Source, open_source
from jaxtune.data.store import tokenize
from jaxtune.data.stream import Stream
from jaxtune.data.token_store import PIECE


class Processes:
    """Threads that stand for processes."""

    def __init__(self, count: int):
        self.count, self.barrier = count, threading.Barrier(count)
        self.values: list[Any] = [None] * count
        self.here = threading.local()

    def gather(self, name: str, value: Any, limit: float | None = None) -> list[Any]:
        self.values[self.here.index] = value
        self.barrier.wait()
        values = list(self.values)
        self.barrier.wait()
        return values

    def all_agree(self, name: str, error: RequestError | None) -> None:
        for other in self.gather(name, error):
            if other is not None:
                raise other

    def run(self, work: Any) -> list[Any]:
        def one(index: int) -> Any:
            self.here.index = index
            return work(index)

        with (
            mock.patch.object(shares, "gather", self.gather),
            mock.patch.object(shares, "gather_arrays", lambda array: self.gather("", array)),
            mock.patch.object(shares, "all_agree", self.all_agree),
            ThreadPoolExecutor(self.count) as pool,
        ):
            return list(pool.map(one, range(self.count)))


def counted(lengths: list[int], read: list[int] | None = None) -> Source:
    """A source of pretokenised examples, which notes what is read."""
    rng = np.random.RandomState(0)
    records = [{"input_ids": rng.randint(3, 90, n).tolist()} for n in lengths]

    def get(index: int) -> dict:
        if read is not None:
            read.append(index)
        return dict(records[index])

    return Source("s", len(records), get, lambda i: f"s:{i + 1}")


LENGTHS = [2 + i * 7 % 11 for i in range(100)]


@pytest.mark.parametrize("count", [2, 3, 7])
@pytest.mark.parametrize("overlong", ["truncate", "drop"])
def test_shares_are_the_whole(count, overlong):
    options = {"seq_len": 9, "overlong": overlong, "num_virtual": 1}
    whole = tokenize(counted(LENGTHS), "tokens", None, **options)
    read: list[list[int]] = [[] for _ in range(count)]

    def work(index: int) -> Any:
        return shares.tokenize_shared(
            counted(LENGTHS, read[index]), "tokens", None, count=count, index=index, **options
        )

    stores = Processes(count).run(work)
    # Each record was read by one process.
    assert sorted(record for own in read for record in own) == list(range(100))
    assert max(len(own) for own in read) <= 100 / count + PIECE
    for store in stores:
        assert isinstance(store, shares.SharedStore)
        assert store.fingerprint() == whole.fingerprint()
        assert store.counts == whole.counts and len(store) == len(whole)
        for name in ("lengths", "records"):
            assert np.array_equal(getattr(store, name), getattr(whole, name))
        for index in range(len(whole)):
            for got, want in zip(store.example(index), whole.example(index), strict=True):
                assert got.dtype == want.dtype and np.array_equal(got, want)
            assert store.where(index) == whole.where(index)
        head, first = store.head(11), whole.head(11)
        assert len(head) == 11
        assert all(np.array_equal(head.example(i)[0], first.example(i)[0]) for i in range(11))


def test_a_stream_over_shares_gives_the_same_rows():
    def stream(store: Any) -> Stream:
        return Stream([store], seq_len=16, packing=True, seed=3)

    whole = stream(tokenize(counted(LENGTHS), "tokens", None, seq_len=16))
    stores = Processes(2).run(
        lambda i: shares.tokenize_shared(
            counted(LENGTHS), "tokens", None, count=2, index=i, seq_len=16
        )
    )
    for index, store in enumerate(stores):
        ours = stream(store)
        assert ours.fingerprint() == whole.fingerprint() and ours.stats() == whole.stats()
        for step in range(9):
            rows = [index, index + 2]
            got, want = ours.batch(step, 4, rows), whole.batch(step, 4)
            assert all(np.array_equal(got[name], want[name][rows]) for name in want)


def test_long_documents_are_tokenised_by_all():
    lengths = [300, 200, 400, *[250] * 20]

    class Letters:
        chat_template, vocab_size, eos_ids = None, 100, ()

    whole = tokenize(counted([8] * 40), "tokens", None, seq_len=8)
    assert len(whole) == 40
    rng = np.random.RandomState(1)
    texts = [rng.randint(3, 90, n) for n in lengths]

    def rendered(source, records, *_):
        from jaxtune.data.chat import Rendered

        for record in records:
            mask = np.ones(len(texts[record]), np.float32)
            mask[0] = 0
            yield record, Rendered(texts[record].astype(np.int32), mask, mask.astype(np.uint8))

    from jaxtune.data import store as module

    with mock.patch.object(module, "_render", rendered):
        source = Source("t", len(lengths), lambda i: {}, lambda i: f"t:{i}")
        options = {"seq_len": 8}
        want = tokenize(source, "text", Letters(), **options)
        stores = Processes(2).run(
            lambda i: shares.tokenize_shared(source, "text", Letters(), count=2, index=i, **options)
        )
    for got in stores:
        assert got.fingerprint() == want.fingerprint() and got.counts == want.counts
        assert np.array_equal(got.ids, want.ids)


def test_what_one_refuses_all_refuse_with_its_line():
    lengths = [*LENGTHS, 50]

    def work(index: int) -> Any:
        with pytest.raises(RequestError) as error:
            shares.tokenize_shared(
                counted(lengths), "tokens", None, count=3, index=index, seq_len=20, key="k"
            )
        return str(error.value)

    told = Processes(3).run(work)
    assert len(set(told)) == 1 and told[0].startswith("s:101: k: the example has 50 tokens")


def test_hosts_with_other_files_are_refused():
    def work(index: int) -> str:
        with pytest.raises(RequestError) as error:
            shares.tokenize_shared(
                counted(LENGTHS[: 90 + index]), "tokens", None, count=2, index=index, seq_len=20
            )
        return str(error.value)

    assert all("90 in process 0, 91 in process 1" in told for told in Processes(2).run(work))


def test_all_dropped_is_refused_as_in_one_process():
    def work(index: int) -> str:
        with pytest.raises(RequestError) as error:
            shares.tokenize_shared(
                counted([30] * 40), "tokens", None, count=2, index=index, seq_len=20,
                overlong="drop",
            )  # fmt: skip
        return str(error.value)

    with pytest.raises(RequestError) as alone:
        tokenize(counted([30] * 40), "tokens", None, seq_len=20, overlong="drop")
    assert set(Processes(2).run(work)) == {str(alone.value)}


@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf", b"\n  \n"])
@pytest.mark.parametrize("end", [b"", b"\n", b"\n\n"])
def test_lines_read_lazily_are_the_lines(tmp_path: Path, start: bytes, end: bytes):
    path = tmp_path / "x.jsonl"
    lines = [json.dumps({"text": t}, ensure_ascii=False).encode() for t in ("a", "ä ö", "c" * 99)]
    path.write_bytes(start + b"\n\n".join(lines) + end)
    eager, lazy = (open_source(f"jsonl:{path}", lazily=lazily) for lazily in (False, True))
    assert len(eager) == len(lazy) == 3
    for index in range(3):
        assert lazy[index] == eager[index] and lazy.where(index) == eager.where(index)


@pytest.mark.parametrize("content", [b"", b"\n\n", b'[{"text": "a"}]', b'{"text": "a"}\n{"te'])
def test_odd_files_read_lazily(tmp_path: Path, content: bytes):
    path = tmp_path / "x.jsonl"
    path.write_bytes(content)
    told = []
    for lazily in (False, True):
        try:
            source = open_source(f"jsonl:{path}", "k", lazily=lazily)
            told.append([source[i] for i in range(len(source))])
        except RequestError as error:
            told.append(str(error))
    assert told[0] == told[1]


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_pairs_in_shares_are_the_whole(tokenizer, shared, split):
    records = [
        {
            "prompt": f"The cat{' x' * (i % 5)}",
            "chosen": f" sat {i}",
            "rejected": " ran" * (1 + i % 4),
            "margin": i,
        }
        for i in range(50)
    ]
    source = Source("s", len(records), records.__getitem__, lambda i: f"s:{i + 1}")
    options = {"seq_len": 44, "overlong": "drop", "shared": shared, "split_pairs": split}
    whole = tokenize(source, "preference", tokenizer, **options)
    assert len(whole) > 20
    stores = Processes(2).run(
        lambda i: shares.tokenize_shared(
            source, "preference", tokenizer, count=2, index=i, **options
        )
    )
    flat = np.random.default_rng(0).normal(size=len(whole.ids)).astype(np.float32)
    want = Stream([whole.with_column("ref_logprobs", flat)], seq_len=44, packing=shared)
    for store in stores:
        assert isinstance(store, shares.SharedStore)
        assert store.fingerprint() == whole.fingerprint()
        assert (store.keys, store.shared, store.format) == (whole.keys, whole.shared, whole.format)
        for name in ("lengths", "records", "prompts", "sides", "completions"):
            np.testing.assert_array_equal(getattr(store, name), getattr(whole, name), name)
        got = Stream([store.with_column("ref_logprobs", flat)], seq_len=44, packing=shared)
        assert got.most_completions == want.most_completions
        for row in range(want.rows_per_epoch(0)):
            one, two = got.row(row), want.row(row)
            assert one.keys() == two.keys()
            for name in one:
                np.testing.assert_array_equal(one[name], two[name], name)
        with pytest.raises(ValueError, match="shape"):
            store.with_column("ref_logprobs", flat[1:])
