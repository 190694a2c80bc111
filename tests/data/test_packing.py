"""Packing: every example once, whole, in a row that has room for it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxtune.data.packing import pack


def slow_best_fit(lengths: list[int], capacity: int) -> list[list[int]]:
    """The same heuristic by looking at every row for every example."""
    rows: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        left = [capacity - sum(lengths[i] for i in row) for row in rows]
        fitting = [r for r in range(len(rows)) if left[r] >= lengths[index]]
        if fitting:
            rows[min(fitting, key=lambda r: (left[r], r))].append(index)
        else:
            rows.append([index])
    return rows


problems = st.integers(1, 50).flatmap(
    lambda capacity: st.tuples(
        st.just(capacity), st.lists(st.integers(1, capacity), min_size=0, max_size=60)
    )
)


@given(problem=problems, seed=st.integers(0, 2**40), window=st.integers(1, 20))
def test_each_example_is_in_exactly_one_row_that_holds_it(problem, seed, window):  # C12
    capacity, lengths = problem
    rows = pack(lengths, capacity, seed, window)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    for row in rows:
        assert 0 < sum(lengths[i] for i in row) <= capacity
        assert len({i // window for i in row}) == 1
        assert row.tolist() == sorted(row)


@given(problem=problems, seed=st.integers(0, 9))
def test_rows_are_those_of_the_slow_best_fit(problem, seed):
    capacity, lengths = problem
    rows = pack(lengths, capacity, seed)
    expected = {tuple(sorted(row)) for row in slow_best_fit(lengths, capacity)}
    assert {tuple(row.tolist()) for row in rows} == expected
    # First-fit and best-fit decreasing need at most 11/9 of the rows of the best packing, plus 4.
    assert len(rows) <= 11 / 9 * (-(-sum(lengths) // capacity) * 2) + 4


def test_the_seed_orders_rows_and_nothing_else():  # C32
    lengths = np.random.default_rng(0).integers(1, 60, 500)
    one, same, other = (pack(lengths, 64, seed) for seed in (1, 1, 2))
    assert [r.tolist() for r in one] == [r.tolist() for r in same]
    assert [r.tolist() for r in one] != [r.tolist() for r in other]
    assert sorted(r.tolist() for r in one) == sorted(r.tolist() for r in other)


def test_little_room_is_left():
    lengths = np.random.default_rng(0).integers(10, 400, 4000)
    rows = pack(lengths, 1024, 0)
    assert lengths.sum() / (len(rows) * 1024) > 0.99


def test_what_does_not_fit_is_an_error():
    with pytest.raises(ValueError, match=r"1\.\.8"):
        pack([3, 9], 8, 0)
    with pytest.raises(ValueError, match=r"1\.\.8"):
        pack([3, 0], 8, 0)
