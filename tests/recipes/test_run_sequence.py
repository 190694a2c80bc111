"""A run whose rows are spread over the `sequence` axis: the same losses, and what it says."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from jaxtune.recipes.train import train
from tests.correctness.tiny_runs import run_config

pytestmark = pytest.mark.slow


def test_a_run_on_a_sequence_axis_equals_one_devices(tmp_path: Path) -> None:
    changes = {
        "peft": {"method": "lora", "rank": 4},
        "total_steps": 3,
        "eval__every_steps": 3,
        "checkpoint__every_steps": None,
        "log__every_steps": 1,
        "optim__warmup_steps": 1,
    }
    out = io.StringIO()
    alone = train(run_config(tmp_path, **changes), tmp_path / "alone")
    spread = run_config(tmp_path, **changes)
    spread["mesh"] = {"fsdp": 2, "sequence": 2}
    found = train(spread, tmp_path / "spread", console=Console(file=out, width=120))

    assert alone.summary["attention"]["name"] == "xla"
    assert found.summary["attention"] == {
        "name": "ring",
        "reason": "mesh.sequence spreads each row over 2 devices",
    }
    assert "attention: ring (mesh.sequence spreads each row over 2 devices)" in out.getvalue()
    assert found.summary["devices"] == 4
    assert len(found.history) == len(alone.history)
    for ours, theirs in zip(found.history, alone.history, strict=True):
        for key in ("loss", "grad_norm", "accuracy", "eval/loss", "eval/accuracy"):
            if key in theirs:
                np.testing.assert_allclose(ours[key], theirs[key], rtol=1e-4, err_msg=key)
