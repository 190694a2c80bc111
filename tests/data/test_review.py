"""The short look at examples, beside counting by hand."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from jaxtune.data import review


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=4), min_size=1, max_size=30))
def test_lengths_and_repeats(examples):
    lengths = np.array([len(example) for example in examples])
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    ids = np.concatenate([np.array(example, np.int32) for example in examples])
    found = review.review(lengths, review.digests(ids, offsets))
    earlier = [example in examples[:number] for number, example in enumerate(examples)]
    assert (found["repeats"], found["compared"]) == (sum(earlier), len(examples))
    assert found["longest"] == max(lengths) and found["median"] == np.median(lengths)
    edges, counts = found["edges"], found["counts"]
    assert sum(counts) == len(examples)
    for low, high, count in zip(edges, edges[1:], counts, strict=False):
        last = high == edges[-1]
        assert count == sum(low <= n < high or (last and n == high) for n in lengths)


def test_so_many_examples_are_compared_and_no_more(monkeypatch):
    monkeypatch.setattr(review, "COMPARED", 3)
    ids = np.zeros(5, np.int32)
    found = review.review(np.ones(5, np.int64), review.digests(ids, np.arange(6)))
    assert (found["compared"], found["repeats"]) == (3, 2)
