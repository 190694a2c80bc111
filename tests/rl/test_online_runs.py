"""Whole runs of GRPO and PPO: what is logged, what stops them, on one device and on eight."""

from __future__ import annotations

import json
from pathlib import Path
from unittest import mock

import jax
import numpy as np
import pytest

import jaxtune
from jaxtune.core.tree import flatten, unflatten
from jaxtune.recipes.reference import base_of
from jaxtune.rl.local_engine import LocalEngine
from jaxtune.rl.rewards.scores import RewardError
from jaxtune.rl.rollouts import SamplerMismatch
from tests.rl.tiny import run_config

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("data")


SHORT = {"total_steps": 4, "eval__every_steps": None, "checkpoint__every_steps": None}


def nan_for_b(prompts: list[str], completions: list[str]) -> list[float]:
    """Fails on prompts that end with b."""
    pairs = zip(prompts, completions, strict=True)
    return [float("nan") if p.endswith("b") else float(len(text)) for p, text in pairs]


@pytest.fixture(scope="module")
def run(data: Path):
    """(workdir, Result) of a short run of PPO."""
    config = run_config(data, "ppo", **SHORT, log__tensorboard=True)
    return data / "ppo", jaxtune.train(config, data / "ppo")


def test_what_is_told_of_each_iteration(run):
    workdir, result = run
    rows = [row for row in result.history if "reward" in row]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    for row in rows:
        assert row["reward"] == row["reward/letters"] and 0 <= row["truncated"] <= 1
        assert row["sampler_gap"] < 1e-5 and row["length"] > 1
        assert {"kl", "entropy", "clip_share", "loss/value", "zero_variance"} < row.keys()
        assert row["sampling_seconds"] > 0 and row["dropped"] == 0
    assert rows[0]["ratio"] == pytest.approx(1, abs=1e-5)
    assert rows[0]["value/mean"] == 0  # the head starts at 0
    assert rows[3]["ratio"] != rows[0]["ratio"] and rows[3]["value/mean"] != 0
    assert {"eval/reward", "eval/reward/letters", "eval/length"} < result.history[-1].keys()
    samples = [json.loads(x) for x in (workdir / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 4
    for sample in samples:
        share = sample["completion"].count(sample["prompt"][-1]) / 8
        assert sample["rewards"] == {"letters": share} and sample["reward"] == share
    [events] = (workdir / "tensorboard").glob("events*")
    assert samples[0]["completion"].encode() in events.read_bytes()


def test_the_result_is_a_language_model_and_exports_without_its_value_head(run, tmp_path):
    from jaxtune.recipes.export import export

    workdir, _ = run
    lm = jaxtune.load(workdir, dtype="float32")
    assert len(lm.generate(["ab"], max_new_tokens=3)) == 1
    export(workdir, "peft", tmp_path / "adapter")
    export(workdir, "hf", tmp_path / "merged")
    merged = jaxtune.load(tmp_path / "merged", dtype="float32")
    ids = np.array([[1, 4, 5, 6]])
    np.testing.assert_allclose(merged.logits(ids), lm.logits(ids), atol=1e-4)


def test_eight_devices_sample_and_train_as_one_does(data, run):
    sizes = {"data": 2, "fsdp": 2, "tensor": 2}
    config = run_config(data, "ppo", **SHORT, mesh=sizes)
    _, one = run
    eight = jaxtune.train(config, data / "eight")
    for ours, its in zip(one.history, eight.history, strict=True):
        for name in ours.keys() - {"tokens_per_second", "step_seconds", "sampling_seconds"}:
            assert ours[name] == pytest.approx(its[name], rel=2e-4, abs=2e-5), name


def test_a_sampler_without_the_adapter_is_caught(data, tmp_path):
    """C18: unsloth #8701, ms-swift #8233."""
    update = LocalEngine.update

    def without_adapter(self, params):
        flat = {p: 0 * x if "/lora/" in p else x for p, x in flatten(params).items()}
        update(self, unflatten(flat))

    config = run_config(data, "ppo", **SHORT | {"total_steps": 8}, optim__lr=0.3)
    with (
        mock.patch.object(LocalEngine, "update", without_adapter),
        pytest.raises(SamplerMismatch, match=r"max_logprob_gap = 0\.05"),
    ):
        jaxtune.train(config, tmp_path / "run")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["stop_reason"] == "error" and summary["step"] in (3, 4)
    assert "the sampler gives its tokens" in summary["error"]


@pytest.mark.parametrize("on_error", ["stop", "drop"])
def test_a_reward_that_gives_nan_stops_the_run_or_drops_the_sample(data, tmp_path, on_error):
    reward = {"function": "tests.rl.test_online_runs:nan_for_b", "on_error": on_error}
    config = run_config(data, "ppo", **SHORT | {"total_steps": 1}, objective__rewards=[reward])
    config["data"]["eval"] = []
    if on_error == "stop":
        with pytest.raises(RewardError, match="nan_for_b gave nan"):
            jaxtune.train(config, tmp_path / "run")
        summary = json.loads((tmp_path / "run" / "summary.json").read_text())
        assert "RewardError" in summary["error"] and summary["stop_reason"] == "error"
        return
    [row] = jaxtune.train(config, tmp_path / "run").history
    assert 0 < row["dropped"] < 1
    # Dropped rows have no target: a row of the batch has at most 8.
    assert row["trained_tokens"] < 8 * 8 and jax.numpy.isfinite(row["loss"])


def test_a_server_samples_in_the_place_of_the_trainers_arrays(data, tmp_path):
    from jaxtune.recipes.assemble import load_parts
    from jaxtune.recipes.build import build
    from jaxtune.recipes.schema.resolve import resolve
    from tests.rl.serving import TinyServer, serving

    config = run_config(data, **SHORT | {"total_steps": 8})
    plan = build(resolve(config))
    params = load_parts(plan.base, plan.parts, plan.mesh, plan.config.seed, None)
    held = TinyServer(plan.parts.config, base_of(plan.parts.config, params))
    with serving(held) as url:
        config["objective"] |= {
            "engine": "openai",
            "server": url,
            "server_model": "base",
            "server_directory": str(tmp_path / "adapters"),
        }
        result = jaxtune.train(config, tmp_path / "run")
    asked = [path for path, _, _ in held.asked]
    # Two iterations and an evaluation: each loads an adapter, and all but the last go again.
    assert asked.count("/v1/load_lora_adapter") == 3 == asked.count("/v1/unload_lora_adapter") + 1
    rows = [row for row in result.history if "reward" in row]
    assert len(rows) == 8 and max(row["sampler_gap"] for row in rows) < 1e-5
    assert rows[-1]["rollout_kl"] != 0 and "eval/reward" in result.history[-1]
