"""The order of examples: exact passes, exact proportions, the same at any access."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxtune.data.order import Order


def test_each_pass_over_a_source_is_a_permutation_of_its_own():
    order = Order([50], [1.0], shuffle=True, seed=3)
    assert order.epoch == 50
    passes = [order.examples(50 * e, 50 * e + 50).tolist() for e in range(3)]
    for one in passes:
        assert sorted(one) == list(range(50))
    assert passes[0] != passes[1] != passes[2]
    unshuffled = Order([5], [1.0], shuffle=False, seed=3)
    assert unshuffled.examples(0, 12).tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1]


mixtures = st.lists(
    st.tuples(st.integers(1, 30), st.floats(0.05, 20, allow_nan=False)), min_size=1, max_size=4
)


@settings(max_examples=60, deadline=None)
@given(mixture=mixtures, cut=st.integers(0, 300), seed=st.integers(0, 5))
def test_access_at_any_place_gives_the_same_sequence(mixture, cut, seed):
    sizes, weights = zip(*mixture, strict=True)
    order = Order(sizes, weights, shuffle=True, seed=seed)
    whole = order.examples(0, 300)
    again = Order(sizes, weights, shuffle=True, seed=seed)
    np.testing.assert_array_equal(again.examples(cut, 300), whole[cut:])
    np.testing.assert_array_equal(order.examples(0, cut), whole[:cut])


@settings(max_examples=60, deadline=None)
@given(mixture=mixtures)
def test_weights_are_the_proportions_and_the_epoch_is_the_shortest(mixture):
    sizes, weights = zip(*mixture, strict=True)
    order = Order(sizes, weights, shuffle=True, seed=0)
    share = np.array(weights) / sum(weights)
    taken = order.examples(0, order.epoch)
    source = np.searchsorted(order.bases, taken, side="right") - 1
    for length in {1, order.epoch // 2, order.epoch}:
        counts = np.bincount(source[:length], minlength=len(sizes))
        np.testing.assert_array_equal(counts, order.counts(length))
        assert np.abs(counts - share * length).max() <= len(sizes) + 1e-3 * length
    assert set(taken.tolist()) == set(range(sum(sizes)))
    assert (order.counts(order.epoch - 1) < order.sizes).any()


def test_the_mixture_is_grains():
    import grain

    order = Order([5, 3, 4], [3, 1, 2], shuffle=False, seed=0)
    parents = [
        grain.MapDataset.range(int(a), int(b)).repeat()
        for a, b in zip(order.bases[:-1], order.bases[1:], strict=True)
    ]
    mixed = grain.MapDataset.mix(parents, [3, 1, 2])
    np.testing.assert_array_equal(order.examples(0, 120), [mixed[i] for i in range(120)])


def test_seed_and_source_change_the_shuffle():  # C32
    def passes(seed):
        return Order([40, 40], [1, 1], shuffle=True, seed=seed).examples(0, 80)

    np.testing.assert_array_equal(passes(1), passes(1))
    assert (passes(1) != passes(2)).any()
    both = passes(1)
    first, second = both[both < 40], both[both >= 40] - 40
    assert (first != second).any()
    # Pass 1 of seed 0 must not be pass 0 of seed 1.
    zero = Order([40], [1], shuffle=True, seed=0).examples(40, 80)
    assert (zero != Order([40], [1], shuffle=True, seed=1).examples(0, 40)).any()


def test_the_shuffle_is_pinned():
    """A change of these numbers breaks the resume of every run made before it."""
    order = Order([8], [1], shuffle=True, seed=0)
    assert order.examples(0, 8).tolist() == [3, 2, 7, 6, 5, 1, 4, 0]
    assert order.examples(8, 16).tolist() == [0, 6, 2, 7, 3, 5, 1, 4]


def test_bad_mixtures():
    for sizes, weights in (([], []), ([1], [1, 2]), ([0], [1]), ([1], [0]), ([1], [-1])):
        with pytest.raises(ValueError, match="sizes"):
            Order(sizes, weights, shuffle=True, seed=0)
