"""`train --budget`: time and money, and a run that stops by it."""

from __future__ import annotations

import jax
import pytest

import jaxtune
from jaxtune.core.errors import RequestError
from jaxtune.recipes.budget import seconds_of
from tests.correctness.tiny_runs import run_config


@pytest.mark.parametrize(
    ("text", "seconds"), [("3h", 10800), ("90min", 5400), ("30s", 30), ("1.5 hours", 5400)]
)
def test_a_time(text, seconds):
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["20USD", "$20", "20 usd"])
def test_money_is_time_at_the_price_of_all_devices(text):
    hours = 20 / (0.5 * jax.device_count())
    assert seconds_of(text, price=0.5) == pytest.approx(hours * 3600)


@pytest.mark.parametrize("text", ["20", "h", "-3h", "3 days", "$3h", ""])
def test_what_is_neither_is_refused(text):
    with pytest.raises(RequestError, match=r"--budget: expected .* 3h, 90min or 20USD"):
        seconds_of(text)


def test_money_needs_a_price():
    with pytest.raises(RequestError, match="no price of cpu is known"):
        seconds_of("20USD")


def test_a_run_stops_by_its_budget_and_goes_on_with_a_larger_one(tmp_path):
    config = run_config(tmp_path, total_steps=4, eval=None, data__eval=[])
    first = jaxtune.train(config, tmp_path / "run", budget="0.0001s")
    assert first.summary["stop_reason"] == "budget" and first.summary["step"] == 1
    again = jaxtune.train(config, tmp_path / "run", budget="0.0001s")
    assert again.summary["stop_reason"] == "budget" and again.summary["step"] == 1
    last = jaxtune.train(config, tmp_path / "run", budget="1h")
    assert last.summary["stop_reason"] == "finished" and last.summary["step"] == 4
