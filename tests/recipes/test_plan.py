"""`plan`: the printed object, with data and without, here and elsewhere."""

from __future__ import annotations

import json
import math

import pytest

import jaxtune
from jaxtune.cli.main import main
from jaxtune.core.errors import RequestError
from jaxtune.planning.fit import ranked
from jaxtune.recipes import train as recipe
from jaxtune.recipes.build import build
from jaxtune.recipes.dry_run import dry_run
from jaxtune.recipes.plans.draft import draft
from jaxtune.recipes.plans.fit import fit, row_parts, starting, trials, with_setting
from jaxtune.recipes.plans.report import analyse
from jaxtune.recipes.schema.resolve import resolve
from tests.correctness.tiny_runs import run_config

LARGE = {
    "model": {"preset": "llama3.1-8b", "remat": "block"},
    "peft": {"method": "lora", "rank": 8},
    "data": {"train": [{"format": "chat"}], "seq_len": 4096},
    "batch_size": 64,
    "total_steps": 100,
    "optim": {"lr": 1e-4},
}


@pytest.fixture(scope="module")
def large():
    return jaxtune.plan(LARGE, devices="8xH100")


def test_every_key_of_the_interface_is_there_and_is_json(large):
    assert {"total", "trainable"} <= large["parameters"].keys()
    sizes = large["bytes_per_device"]
    parts = ("weights", "trainable", "optimizer", "gradients", "activations", "logits")
    assert sum(sizes[name] for name in parts) == sizes["total"]
    wanted = "tokens_per_step flops_per_step hbm_bytes_per_device fits step_seconds run_seconds "
    assert large.keys() >= set((wanted + "cost_usd binding_limit").split())
    assert "compiled" not in large
    assert json.loads(json.dumps(large)) == large


def test_its_figures_are_those_of_the_model(large):
    total, trained = large["parameters"]["total"], large["parameters"]["trainable"]
    assert total - trained == 8_030_261_248 and trained == 20_971_520
    groups = large["parameters"]["groups"]
    assert sum(row["total"] for row in groups.values()) == total
    assert sum(row["trainable"] for row in groups.values()) == trained
    assert large["tokens_per_step"] == 64 * 4096
    assert large["bytes_per_device"]["weights"] == 8_030_261_248 * 2 // 8
    # Forward, again, and the input's gradient: three products a weight, of two operations.
    assert large["flops_per_token"] == pytest.approx(6 * 7.5e9, rel=0.2)
    assert large["seconds"]["compute"] == large["flops_per_step"] / 8 / 989e12
    assert large["step_seconds"] == max(large["seconds"].values())
    assert large["run_seconds"] == 100 * large["step_seconds"]
    hours = large["run_seconds"] / 3600
    assert large["cost_usd"] == pytest.approx(hours * 8 * large["price"]["usd_per_device_hour"])


def test_replayed_rows_are_counted_as_the_objective_s_are():
    """Half of the rows of the large plan, and as many replayed ones, whose data are not here."""
    old = {"replay_data": [{"source": "jsonl:none", "format": "text"}], "replay": 0.1}
    half = LARGE | {"batch_size": 32}
    found = jaxtune.plan(half | {"retention": old}, devices="8xH100")
    alone = jaxtune.plan(half, devices="8xH100")
    more = jaxtune.plan(half | {"retention": old | {"replay_batch_size": 96}}, devices="8xH100")
    for name in ("tokens_per_step", "flops_per_step"):
        assert found[name] == 2 * alone[name] and more[name] == 4 * alone[name], name
    sizes = [plan["bytes_per_device"]["activations"] for plan in (alone, found, more)]
    assert sizes[0] < sizes[1] < sizes[2]


def test_absent_data_are_said_to_be_absent(large):
    assert large["steps"] == 100 and large["tokens"] is None
    assert large["length_from"] == "total_steps; data.train is not here to measure"
    epochs = {**LARGE, "total_epochs": 2, "data": {**LARGE["data"], "packing": True}}
    del epochs["total_steps"]
    unknown = jaxtune.plan(epochs, devices="8xH100", price=1.0)
    assert unknown["steps"] is unknown["run_seconds"] is unknown["cost_usd"] is None
    assert "total_epochs needs the data" in unknown["length_from"]


def test_data_that_are_here_are_measured(tmp_path):
    config = run_config(tmp_path)
    planned, dry = jaxtune.plan(config), dry_run(config)
    assert planned["steps"] == 12 == dry["steps"]
    assert planned["flops_per_step"] == dry["flops_per_step"]
    assert planned["length_from"] == "measured on the data"
    stats = dry["data"]
    rate = stats["tokens_per_epoch"] / stats["rows_per_epoch"]
    assert planned["tokens"] == round(12 * 4 * rate)
    assert planned["devices"]["chip"] == "cpu" and planned["cost_usd"] is None
    assert planned["step_seconds"] > 0


def test_what_lies_on_a_device_is_what_the_step_takes(tmp_path):
    config = run_config(tmp_path, grad_accum=1)
    planned = jaxtune.plan(config)["bytes_per_device"]
    asked = dry_run(config)["bytes_per_device"]["arguments"]
    batch = 4 * 24 * 4 * 4
    resident = sum(planned[name] for name in ("weights", "trainable", "optimizer"))
    assert resident + batch == pytest.approx(asked, rel=0.02)
    build(resolve(config))  # the same config also runs


def test_nothing_is_loaded_and_config_json_is_enough(tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(recipe, "load_parts", refuse)
    directory = tmp_path / "model"
    directory.mkdir()
    hf = {"model_type": "llama", "vocab_size": 1000, "hidden_size": 64, "intermediate_size": 96}
    hf |= {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
    hf |= {"max_position_embeddings": 512, "rms_norm_eps": 1e-5, "rope_theta": 1e4}
    (directory / "config.json").write_text(json.dumps(hf | {"tie_word_embeddings": False}))
    config = {**LARGE, "model": {"path": str(directory)}, "peft": {"method": "full"}}
    config["data"] = {"train": [{"format": "chat"}], "seq_len": 128}
    planned = jaxtune.plan(config, devices="2xv5e")
    layer = 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96 + 2 * 64
    assert planned["parameters"]["total"] == 3 * layer + 2 * 1000 * 64 + 64


def test_damaged_data_and_contradictions_are_refused(tmp_path):
    config = run_config(tmp_path)
    (tmp_path / "a.jsonl").write_text("{")
    with pytest.raises(RequestError, match=r"a\.jsonl:1"):
        jaxtune.plan(config)
    with pytest.raises(RequestError, match="batch_size"):
        jaxtune.plan({**LARGE, "batch_size": 3}, devices="2xH100")
    with pytest.raises(RequestError, match="--topology"):
        jaxtune.plan(LARGE, topology="v5e:4x4", devices="2xH100")


def test_a_run_that_does_not_fit_says_so_and_the_verb_succeeds(tmp_path, capsys):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(LARGE | {"peft": {"method": "full"}}))
    assert main(["plan", f"--config={path}", "--devices=1xv5e", "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert planned["fits"] is False and planned["headroom_bytes"] < 0
    assert planned["binding_limit"] == "memory capacity"
    assert main(["plan", f"--config={path}", "--devices=64xv5p", "--price=2"]) == 0
    shown = capsys.readouterr().out
    assert "fits" in shown and "64xv5p" in shown and "2 an hour" in shown


def test_fit_finds_what_fits_and_its_lines_make_it():
    config = {**LARGE, "model": {"preset": "llama3.2-1b"}, "data": {**LARGE["data"]}}
    config["data"]["seq_len"] = 1024
    found = fit(config, devices="4xv5e")
    assert found["fits"] and found["fit"]["searched"] > found["fit"]["fitting"] > 0
    raw = {"model": {"preset": "llama3.2-1b"}}

    class Section(dict):
        __getattr__, __setattr__ = dict.__getitem__, dict.__setitem__

    pasted = Section(config, model=Section(raw["model"]))
    for line in found["fit"]["lines"]:
        exec(line, {"config": pasted})
    again = jaxtune.plan(pasted, devices="4xv5e")
    assert again["bytes_per_device"] == found["bytes_per_device"]
    assert again["step_seconds"] == found["step_seconds"]
    assert math.prod(again["mesh"].values()) == 4
    with pytest.raises(RequestError, match=r"--fit: none of \d+ settings fits"):
        fit({**LARGE, "peft": {"method": "full"}}, devices="1xv5e")


@pytest.mark.slow
def test_fit_spreads_long_rows_and_experts_where_there_are_any():
    """Two rows for four devices, which the config's own mesh does not take."""
    config = {**LARGE, "model": {"preset": "qwen3-30b-a3b"}, "batch_size": 2}
    config["data"] = {"train": [{"format": "chat"}], "seq_len": 16384}
    config["peft"] = {"method": "lora", "variant": "pissa"}
    with pytest.raises(RequestError, match="batch_size"):
        draft(config, devices="4xv5p")
    started = draft(starting(config), devices="4xv5p")
    found = {trial.setting: trial for trial in trials(started)}
    assert {s.sequence for s in found} == {1, 2, 4} and {s.expert for s in found} == {1, 2}
    assert all(s.tensor > 1 for s in found if s.sequence == 1)  # whole rows do not go round
    # PiSSA starts from whole weights, and training refuses quantised ones.
    assert {s.quantize for s in found} == {"none"}
    order = ranked(found.values(), started.target.chip.hbm_bytes)
    best = with_setting(config, order[0].setting)
    again = draft(best, devices="4xv5p")
    assert analyse(again)[0]["total"] == order[0].total_bytes
    spread = [t.setting for t in order if t.setting.sequence > 1]
    ring = draft(with_setting(config, spread[0]), devices="4xv5p")
    assert str(ring.program.attention).startswith("ring")
    named = {**config, "model": {**config["model"], "attention": "xla"}}
    assert row_parts(draft(starting(named), devices="4xv5p").config, 4) == [1]
