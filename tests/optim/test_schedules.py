"""Schedules against the formula, step by step in plain Python."""

import itertools
import math

import numpy as np
import pytest

from jaxtune.optim.schedules import make_schedule

LR = 0.3


def oracle(name, step, total, warmup, end, decay):
    """The learning rate of a step, in float64."""
    rise = min((step + 1) / warmup, 1.0) if warmup else 1.0
    if name == "constant":
        fall = 1.0
    elif name == "wsd":
        last = max(math.ceil(total * decay), 1)
        left = min(max((total - step) / last, 0.0), 1.0)
        fall = end + (1 - end) * left
    else:
        done = min(max((step - warmup) / max(total - warmup, 1), 0.0), 1.0)
        fall = 0.5 * (1 + math.cos(math.pi * done)) if name == "cosine" else 1 - done
        fall = end + (1 - end) * fall
    return LR * rise * fall


@pytest.mark.parametrize("name", ["constant", "linear", "cosine", "wsd"])
@pytest.mark.parametrize(
    ("total", "warmup", "end", "decay"),
    [(20, 0, 0.0, 0.1), (20, 5, 0.1, 0.3), (7, 7, 0.0, 0.5), (1, 0, 0.5, 1.0), (10, 1, 1.0, 0.25)],
)
def test_every_step_equals_the_formula(name, total, warmup, end, decay):
    schedule = make_schedule(name, LR, total, warmup, end, decay)
    steps = range(total + 2)
    found = [float(schedule(np.int32(step))) for step in steps]
    expected = [oracle(name, step, total, warmup, end, decay) for step in steps]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["constant", "linear", "cosine", "wsd"])
def test_the_first_step_learns_and_warm_up_ends_at_the_peak(name):
    schedule = make_schedule(name, LR, total_steps=20, warmup_steps=4)
    np.testing.assert_allclose(
        [float(schedule(step)) for step in range(4)], [LR / 4, LR / 2, 3 * LR / 4, LR], rtol=1e-6
    )


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_the_rate_falls_from_the_peak_and_reaches_its_end_behind_the_last_step(name):
    """The last step, total_steps − 1, still learns; the end is reached where the next would be."""
    schedule = make_schedule(name, LR, total_steps=10, warmup_steps=2, end_ratio=0.1)
    rates = [float(schedule(step)) for step in range(11)]
    assert rates[2] == pytest.approx(LR)
    assert all(a > b for a, b in itertools.pairwise(rates[2:]))
    assert rates[9] > 0.1 * LR
    assert rates[10] == pytest.approx(0.1 * LR)


def test_wsd_is_flat_until_its_last_part():
    schedule = make_schedule("wsd", LR, total_steps=20, end_ratio=0.0, decay_ratio=0.25)
    rates = [float(schedule(step)) for step in range(21)]
    np.testing.assert_allclose(rates[:16], LR, rtol=1e-6)
    np.testing.assert_allclose(rates[15:], LR * np.array([5, 4, 3, 2, 1, 0]) / 5, atol=1e-7)


def test_the_rate_is_float32():
    assert make_schedule("cosine", LR, 10)(np.int32(3)).dtype == np.float32
