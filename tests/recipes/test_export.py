"""Exports of whole runs: read back and compared, with a card; a wrong one is not kept."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file, save_file

import jaxtune
from jaxtune.checkpoints.hf_directory import MARKER
from jaxtune.checkpoints.peft_files import save_adapter
from jaxtune.cli.main import main
from jaxtune.core.errors import RequestError
from jaxtune.core.tree import flatten, unflatten
from jaxtune.peft.lora import Lora
from jaxtune.recipes import export as recipe
from jaxtune.recipes.export import ExportError, export
from jaxtune.recipes.report.model_card import front_matter, table
from tests.checkpoints.world import random_params
from tests.correctness.runs import base_params, run_config

pytestmark = pytest.mark.slow
IDS = np.random.default_rng(0).integers(0, 30, (2, 10))
HOW = {
    "lora": {"method": "lora", "rank": 3, "train": ["final_norm/scale"]},
    "adapter": {"method": "adapter", "bottleneck": 4},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Returns a function: a method → the workdir of a finished run."""
    made = {}

    def find(name: str):
        if name not in made:
            workdir = tmp_path_factory.mktemp(name) / "run"
            jaxtune.train(run_config(workdir.parent, HOW[name]), str(workdir))
            made[name] = workdir
        return made[name]

    return find


def card_of(directory):
    text = (directory / "README.md").read_text(encoding="utf-8")
    _, header, body = text.split("---\n", 2)
    return yaml.safe_load(header), body


@pytest.mark.parametrize(
    ("name", "format", "dtype", "files"),
    [
        ("lora", "hf", None, {"config.json", "generation_config.json", "model.safetensors"}),
        ("lora", "hf", "bfloat16", {"config.json", "generation_config.json", "model.safetensors"}),
        ("lora", "peft", None, {"adapter_config.json", "adapter_model.safetensors"}),
        ("lora", "gguf", "float16", {"model.gguf"}),
        ("adapter", "jaxtune", None, {"jaxtune_adapter.json", "jaxtune_adapter.safetensors"}),
    ],
)
def test_formats(name, format, dtype, files, run, tmp_path):
    if format == "gguf":
        pytest.importorskip("gguf")
    workdir, out = run(name), tmp_path / "out"
    report = export(workdir, format, out, dtype=dtype)
    assert report["dtype"] == (dtype or "float32")
    assert report["max_logit_error"] <= report["bound"] == recipe.BOUNDS[report["dtype"]]
    assert {file.name for file in out.iterdir()} == files | {"README.md", MARKER}
    header, body = card_of(out)
    assert header["library_name"] == {"hf": "transformers"}.get(format, format)
    assert header["tags"] == ["jaxtune", name, "sft"]
    assert isinstance(header["base_model"], str) and header["pipeline_tag"] == "text-generation"
    summary = json.loads((workdir / "summary.json").read_text())
    for digest in ("base", "data"):
        assert f"| {digest} | {summary['fingerprints'][digest]} |" in body
    assert f"| loss | {summary['metrics']['loss']} |" in body
    config = body.split("## Config\n\n```json\n")[1].split("\n```")[0]
    assert json.loads(config) == json.loads((workdir / "config.json").read_text())
    assert "train.jsonl | tokens | 1.0 |" in body


def test_the_layout_of_our_own_loads_as_an_adapter(run, tmp_path):
    workdir = run("adapter")
    export(workdir, "jaxtune", tmp_path / "adapter")
    lm = jaxtune.load(workdir, dtype="float32")
    lm.use(None).save(tmp_path / "base", "hf")
    again = jaxtune.load(tmp_path / "base", adapter=tmp_path / "adapter", dtype="float32")
    np.testing.assert_allclose(again.logits(IDS), lm.logits(IDS), rtol=1e-5, atol=1e-5)
    with pytest.raises(RequestError, match="export format 'jaxtune'"):
        export(workdir, "peft", tmp_path / "peft")
    assert not (tmp_path / "peft").exists()


def spoil(directory):
    """Adds a little to each tensor of what was written."""
    for file in directory.glob("*.safetensors"):
        tensors = {name: tensor + 0.01 for name, tensor in load_file(file).items()}
        save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize("format", ["hf", "peft"])
def test_an_export_that_computes_otherwise_fails_and_the_old_one_stays(
    format, run, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "out"
    export(run("lora"), format, out)
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    save = recipe.LanguageModel.save

    def spoiled(lm, directory, how="hf"):
        save(lm, directory, how)
        spoil(directory)

    monkeypatch.setattr(recipe.LanguageModel, "save", spoiled)
    with pytest.raises(ExportError, match=r"logits differ by .* is left as it was"):
        export(run("lora"), format, out)
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    command = ["export", f"--workdir={run('lora')}", f"--format={format}", f"--out={out}"]
    assert main(command) == 1
    assert "logits differ" in capsys.readouterr().err
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before


def test_a_config_that_says_something_else_fails(run, tmp_path, monkeypatch):
    """The logits of a short probe are the same under it."""
    save = recipe.LanguageModel.save

    def misdescribed(lm, directory, how="hf"):
        save(lm, directory, how)
        path = Path(directory) / "config.json"
        fields = json.loads(path.read_text())
        path.write_text(json.dumps(fields | {"max_position_embeddings": 4096}))

    monkeypatch.setattr(recipe.LanguageModel, "save", misdescribed)
    with pytest.raises(ExportError, match="means max_position_embeddings=4096, which"):
        export(run("lora"), "hf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_dtypes_that_a_format_has_not_are_refused(run, tmp_path):
    for format, dtype in (("peft", "bfloat16"), ("hf", "q8_0"), ("jaxtune", "float16")):
        with pytest.raises(RequestError, match=f"cannot be written as {format}"):
            export(run("lora"), format, tmp_path / "out", dtype=dtype)
    with pytest.raises(RequestError, match="'onnx' is none of hf, peft"):
        export(run("lora"), "onnx", tmp_path / "out")


def test_a_directory_that_is_no_export_is_left_alone(run, tmp_path):
    shutil.copytree(run("lora"), tmp_path / "other")
    with pytest.raises(RequestError, match="no part of an export"):
        export(run("lora"), "hf", tmp_path / "other")


def test_headers_are_yaml_whatever_the_base_is_called():
    method = dataclasses.replace(Lora(), rank=2)
    name = 'C:\\models: "tiny" #1 é'
    header = yaml.safe_load(front_matter(name, method, "peft", None).strip("-\n"))
    assert header["base_model"] == name and header["base_model_relation"] == "adapter"
    assert table(("a", "b"), [("x|y", "1\n2")]).splitlines()[-1] == "| x\\|y | 1 2 |"


def test_a_run_from_an_adapter_with_patterns_and_saved_modules(tmp_path):
    """The padding stays zero, scales and saved modules are the adapter's; and so back to PEFT."""
    method = Lora(rank=3, targets=("q_proj", "up_proj"), per_layer=True, train=("final_norm/.*",))
    config, params = base_params()
    own = flatten(random_params(config, method))
    own |= {path: leaf for path, leaf in flatten(params).items() if path != "final_norm/scale"}
    for name in ("q_proj", "up_proj"):
        place = f"blocks/{'attn' if name == 'q_proj' else 'mlp'}/{name}/lora"
        own[f"{place}/a"] = own[f"{place}/a"].at[1, :, 1:].set(0.0)
        own[f"{place}/b"] = own[f"{place}/b"].at[1, 1:].set(0.0)
    save_adapter(tmp_path / "in", config, method, unflatten(own), "base")
    peft = {"method": "lora", "init_from": str(tmp_path / "in")}
    jaxtune.train(run_config(tmp_path, peft), str(tmp_path / "run"))
    lm = jaxtune.load(tmp_path / "run", dtype="float32")
    assert lm.method.per_layer and lm.method.train == ("final_norm/scale",)
    now = flatten(lm.params)
    for path, leaf in own.items():
        moved = np.asarray(now[path]) != np.asarray(leaf)
        if path.endswith(("/lora/a", "/lora/b")):
            assert np.array_equal(moved, np.asarray(leaf) != 0.0), path
        elif path == "final_norm/scale":
            assert moved.all()
        else:
            assert not moved.any(), path
    export(tmp_path / "run", "peft", tmp_path / "out")
    fields = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert fields["r"] == 3 and fields["modules_to_save"] == ["model.norm"]
    assert set(fields["rank_pattern"].values()) == {1} and len(fields["rank_pattern"]) == 2
