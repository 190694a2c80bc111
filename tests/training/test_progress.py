"""What a run prints away from a terminal."""

from __future__ import annotations

import io

from rich.console import Console

from jaxtune.training import progress


def test_the_time_of_the_first_step_is_no_rate_and_no_forecast(monkeypatch):
    clock = iter([100.0, 104.0, 120.0, 121.0])  # 100: compiled and stepped; then 2 s a step
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    told = Console(file=io.StringIO(), width=80)
    with progress.ProgressDisplay(told, 30, 4) as display:
        display.update(5, 3.25, 0.0)
        display.update(7, 3.0, 50.0)  # within ten seconds of the last line
        display.update(15, 2.5, 1234.0)
        display.update(30, 1.0, 1234.0)
    assert told.file.getvalue().splitlines() == [
        "step 5/30  loss 3.2500",
        "step 15/30  loss 2.5000  1,234 tokens/s  30 s left",
        "step 30/30  loss 1.0000  1,234 tokens/s  0 s left",
    ]
