"""What a plan says of sampling, against the sampler's own arrays and sums written out by hand."""

from __future__ import annotations

import json
import math

import jax
import pytest

import jaxtune
from jaxtune.cli.main import main
from jaxtune.core.tree import flatten
from jaxtune.generate import sampler, slots
from jaxtune.models.decoder import abstract_params
from jaxtune.models.presets import preset
from jaxtune.parallel.mesh import abstract_mesh, make_mesh
from jaxtune.peft.method import Method
from jaxtune.planning import chips, sampling
from jaxtune.planning.sampling import Draw
from tests.generate.tiny_models import CONFIG, model
from tests.rl.tiny import run_config

GRPO = {
    "model": {"preset": "llama3.2-1b"},
    "peft": {"method": "lora", "rank": 8},
    "objective": {
        "name": "grpo",
        "rewards": [{"function": "contains", "arguments": {"word": "a"}}],
        "max_new_tokens": 512,
    },
    "data": {"train": [{"format": "prompt"}], "seq_len": 1024},
    "batch_size": 32,
    "total_steps": 100,
    "optim": {"lr": 1e-5},
}


@pytest.mark.parametrize("samples", [1, 3])
def test_the_cache_has_the_sampler_s_rows_and_columns(samples, monkeypatch):
    """Of seven prompts, more samples than slots."""
    prompts = [list(range(1, 2 + n)) for n in (1, 4, 20, 7, 3, 2, 9)]
    real, seen = slots.programs(CONFIG, model("full")[1]), {}

    def start(rows, width, new):
        seen["start"] = (rows, width, width + new)
        return real.start(rows, width, new)

    def read(params, some):
        seen["bank"] = some.batch["input_ids"].shape
        return real.read(params, some)

    def decode(*arguments):
        written = real.decode(*arguments)
        seen["steps"] = seen.get("steps", 0) + int((written.ids >= 0).any(axis=0).sum())
        return written

    watched = real._replace(start=start, read=read, decode=decode)
    monkeypatch.setattr(sampler, "programs", lambda *_: watched)
    sampler.sample(*model("full"), prompts, samples, max_new_tokens=5, slots=4)
    draw = Draw(7, samples, 21, 5, 4)
    assert seen["start"] == (draw.rows, draw.prompt_columns, draw.columns)
    assert seen["bank"] == (draw.bank, draw.prompt_columns)
    assert seen["steps"] == draw.steps


@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")
@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 1, 8), (8, 1, 1)])
def test_a_device_holds_its_share_of_the_cache(sizes):
    """Rows that do not divide stay whole, and heads that are too few give their width."""
    mesh = make_mesh(dict(zip(("data", "fsdp", "tensor"), sizes, strict=True)))
    with jax.set_mesh(mesh):
        held = slots.programs(CONFIG, Method()).start(4, 16, 32).cache
    real = sum(array.addressable_shards[0].data.nbytes for array in (held.keys, held.values))
    assert sampling.cache_bytes(CONFIG, mesh, 4, 48) == real


def test_decoding_reads_weights_and_cache_for_each_token():
    config, chip = preset("llama3.2-1b"), chips.CHIPS["H100"]
    shapes = abstract_params(config, Method())
    draw = Draw(8, 8, 100, 512, 64)
    weights = 2 * sum(leaf.size for leaf in flatten(shapes).values())
    cache = 64 * (128 + 512) * 2 * 2 * config.num_layers * config.num_kv_heads * config.head_dim
    one = sampling.decoding(config, shapes, abstract_mesh({"fsdp": 1}, 1), chip, draw)
    assert one.binding == "memory bandwidth"
    assert one.step_seconds == pytest.approx(512 * (weights + cache) / chip.hbm_rate)
    operations = 64 * 2 * (weights / 2)  # but for norms and attention
    assert one.seconds["compute"] == pytest.approx(512 * operations / chip.flops, rel=0.1)
    half = Draw(8, 8, 100, 512, 32)  # written in two turns, with half of the cache
    two = sampling.decoding(config, shapes, abstract_mesh({"fsdp": 1}, 1), chip, half)
    assert two.step_seconds == pytest.approx(1024 * (weights + cache / 2) / chip.hbm_rate)
    spread = sampling.decoding(config, shapes, abstract_mesh({"fsdp": 4}, 4), chip, draw)
    moved = 512 * (3 * weights + cache / 4) / chip.hbm_rate
    assert spread.seconds["memory bandwidth"] == pytest.approx(moved)
    sent = 512 * weights * 3 / 4 / chip.link_rate
    assert spread.seconds["interconnect"] == pytest.approx(sent)


def test_a_token_reads_the_experts_that_it_can_choose():
    config = preset("qwen3-30b-a3b")
    path = "blocks/experts/gate_proj/kernel"
    per, count = config.experts.per_token, config.experts.count
    assert sampling.chosen_share(config, path, 1) == per / count
    assert sampling.chosen_share(config, path, count) == 1.0
    assert sampling.chosen_share(config, "embed/embedding", 1) == float(config.tie_embeddings)


def test_the_plan_counts_iterations():
    plan = jaxtune.plan(GRPO, devices="1xH100", price=2.0)
    drawn = plan["sampling"]
    assert drawn["tokens"] == 64 * 512 and drawn["steps"] == 2 and drawn["rows"] == 64
    parts = ("decode_seconds", "prefill_seconds", "scoring_seconds")
    assert drawn["seconds"] == pytest.approx(sum(drawn[name] for name in parts))
    whole = 100 * plan["step_seconds"] + 50 * drawn["seconds"]
    assert plan["run_seconds"] == pytest.approx(whole)
    assert plan["cost_usd"] == pytest.approx(whole / 3600 * 2.0)
    # Twice what a token costs forwards, of the policy and its reference, and no gradient.
    config = preset("llama3.2-1b")
    weights = sum(leaf.size for leaf in flatten(abstract_params(config, Method())).values())
    least = 2 * 64 * 1024 * 2 * weights / chips.CHIPS["H100"].flops
    assert drawn["scoring_seconds"] == pytest.approx(least, rel=0.15)
    assert "sampling" not in jaxtune.plan(
        GRPO | {"objective": {"name": "sft"}, "data": {"train": [{}], "seq_len": 1024}},
        devices="1xH100",
    )


def test_a_cache_that_does_not_fit_is_a_run_that_does_not():
    objective = GRPO["objective"] | {"prompts": 128, "slots": 1024}
    plan = jaxtune.plan(GRPO | {"objective": objective, "grad_accum": 32}, devices="1xRTX4090")
    sizes = plan["bytes_per_device"]
    assert sizes["total"] < plan["usable_bytes_per_device"]
    held = plan["sampling"]["bytes_per_device"]
    assert held == plan["sampling"]["kv_cache_bytes"] + sum(
        sizes[name] for name in ("weights", "trainable", "optimizer")
    )
    assert plan["fits"] is False and plan["binding_limit"] == "memory capacity"
    assert plan["headroom_bytes"] == plan["usable_bytes_per_device"] - held < 0


def test_the_reference_is_a_copy_of_what_is_trained():
    objective = GRPO["objective"] | {"kl_coef": 0.0}
    without, with_ = (
        jaxtune.plan(GRPO | {"objective": o}, devices="1xH100")["bytes_per_device"]
        for o in (objective, GRPO["objective"])
    )
    assert with_["weights"] - without["weights"] == without["trainable"]
    assert with_["total"] - without["total"] == without["trainable"]


def test_prompts_that_are_here_are_measured_and_a_server_has_its_own_memory(tmp_path, capsys):
    config = run_config(tmp_path)
    drawn = jaxtune.plan(config)["sampling"]
    width = 2 * 4 * 2 * 2 * 8  # float32, two layers, two heads of 8, keys and values
    assert drawn["kv_cache_bytes"] == width * (16 * (16 + 16) + 4 * 16)
    assert drawn["decode_steps"] == 8 and math.isfinite(drawn["seconds"])
    server = {"engine": "openai", "server": "http://x", "server_model": "m"}
    config["objective"] |= server | {"server_directory": str(tmp_path)}
    served = jaxtune.plan(config)["sampling"]
    assert "kv_cache_bytes" not in served and served["seconds"] == served["scoring_seconds"]
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    assert main(["plan", f"--config={path}"]) == 0
    assert "the server's not counted" in " ".join(capsys.readouterr().out.split())
