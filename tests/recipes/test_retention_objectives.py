"""What a run retains, with other objectives than SFT: measured, pulled back and gated alike."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import jaxtune
from tests.correctness import pair_runs
from tests.correctness.tiny_runs import arrays, rows
from tests.rl import tiny

pytestmark = pytest.mark.slow
OLD = {"dpo": "w1 w3 w5 w7 w9", "grpo": "abc cba", "ppo": "abc cba"}


def config_of(name: str, directory: Path) -> dict:
    config = pair_runs.pair_config(directory) if name == "dpo" else tiny.run_config(directory, name)
    old = directory / "old.jsonl"
    old.write_text(json.dumps({"text": OLD[name]}) + "\n")
    config["retention"] = {
        "data": [{"source": f"jsonl:{old}", "format": "text"}],
        "measure_kl": True,
        "l2sp": 0.1,
        "ewc": 1.0,
        "max_kl": 1e-12,
    }
    config["eval"] = {**config["eval"], "every_steps": 1}
    return config


@pytest.mark.parametrize("name", sorted(OLD))
def test_it_is_measured_pulled_back_and_gated(name, tmp_path):
    summary = jaxtune.train(config_of(name, tmp_path), tmp_path / "run").summary
    found = [row for row in rows(tmp_path / "run") if "retention/nll" in row]
    assert found[0]["step"] == 0 and found[0]["retention/kl"] == pytest.approx(0, abs=1e-6)
    last = found[-1]
    rise = last["retention/nll"] - found[0]["retention/nll"]
    assert last["retention/nll_rise"] == pytest.approx(rise, abs=1e-6) and last["retention/kl"] > 0
    assert summary["stop_reason"] == "retention" and summary["step"] == last["step"] <= 2
    held = arrays(tmp_path / "run")
    starts, fisher = (
        {path: leaf for path, leaf in held.items() if f"/{part}/" in path}
        for part in ("start", "importance")
    )
    assert starts and len(starts) == len(fisher)
    assert any(np.any(leaf > 0) for leaf in fisher.values())
