"""Lengths become few shapes, and every row still fits its own."""

from collections import Counter

import numpy as np
import pytest

from jaxtune.evaluate.shapes import PROGRAMS, Costs, Shape, joined, merged, step

COSTS = Costs(token=1e6, key=1e3, place=1e5)


@pytest.mark.parametrize("count", range(0, 700, 7))
def test_a_step_holds_its_count_and_wastes_less_than_half(count):
    assert step(count) >= count
    assert step(count) == 16 or step(count) < 1.55 * count
    assert step(step(count)) == step(count)


def many(seed: int) -> Counter:
    rng = np.random.default_rng(seed)
    lengths = rng.geometric(0.01, size=(500, 2)).tolist()
    shapes = [Shape(step(a), int(rng.choice([0, 2, 4])), step(b % 90)) for a, b in lengths]
    return Counter(shapes)


@pytest.mark.parametrize("seed", range(3))
def test_many_lengths_are_a_handful_of_programs_in_which_every_row_fits(seed):
    counts = many(seed)
    assert len(counts) > 2 * PROGRAMS
    found = merged(counts, COSTS, compiling=0.0)
    assert found.keys() == counts.keys()
    assert 2 < len(set(found.values())) <= PROGRAMS
    for small, big in found.items():
        assert joined(small, big) == big
        assert bool(small.tips) == bool(big.tips)


def test_few_rows_are_padded_rather_than_compiled_for():
    """Rows with tips and rows without cannot share a program."""
    counts = {Shape(32, 0, 16): 1, Shape(512, 0, 16): 1, Shape(64, 4, 16): 1}
    found = merged(counts, COSTS, compiling=1e12)
    assert found[Shape(32, 0, 16)] == Shape(512, 0, 16)
    assert found[Shape(64, 4, 16)] == Shape(64, 4, 16)


def test_many_rows_are_compiled_for_rather_than_padded():
    counts = {Shape(32, 0, 16): 10_000, Shape(512, 0, 16): 10_000}
    assert merged(counts, COSTS, compiling=1e9) == {shape: shape for shape in counts}


def test_nothing_needs_no_program():
    assert merged({}, COSTS, 1.0) == {}
