"""`train --dry_run`: the whole of a run but training, on abstract weights."""

from __future__ import annotations

import io
import json
from pathlib import Path

import jax
import pytest
from rich.console import Console

from jaxtune.cli.main import main
from jaxtune.core.errors import RequestError
from jaxtune.recipes import train as recipe
from jaxtune.recipes.build import build
from jaxtune.recipes.dry_run import dry_run
from jaxtune.recipes.schema.resolve import resolve
from tests.correctness.tiny_runs import run_config, tree_hash


def test_it_reports_sizes_data_and_masks_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = run_config(tmp_path, grad_accum=1, model__overrides__num_layers=1)
    before = tree_hash(tmp_path)

    def refuse(*_: object) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(recipe, "load_parts", refuse)
    out = io.StringIO()
    report = dry_run(config, Console(file=out, width=120))
    assert tree_hash(tmp_path) == before
    plan = build(resolve(config))
    assert report["parameters"] == plan.parts.counts()
    assert report["steps"] == 12 and report["tokens_per_step"] == 4 * 24
    assert report["data"]["sources"][0]["records"] == 37
    shown = out.getvalue()
    assert "⟦" in shown and "a.jsonl:" in shown and "parameters trainable" in shown
    assert report["attention"]["name"] == "xla" and "runs everywhere" in shown
    json.dumps(report)

    sizes = report["bytes_per_device"]
    state, frozen, batch = plan.abstract_arguments()
    leaves = jax.tree.leaves((state, frozen, batch))
    asked = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    assert abs(sizes["arguments"] - asked) < 0.1 * asked
    assert sizes["temporary"] > 0 and sizes["total"] >= sizes["arguments"]


@pytest.mark.parametrize("method", ["lora", "full"])
def test_its_flops_are_those_that_xla_counts_where_nothing_loops(
    tmp_path: Path, method: str
) -> None:
    """One layer, so that the loop over layers, whose body XLA counts once, is the whole."""
    config = run_config(
        tmp_path,
        peft={"method": method},
        data__train=[{"source": f"jsonl:{tmp_path}/a.jsonl", "format": "tokens"}],
        grad_accum=1,
        batch_size=2,
        model__overrides__num_layers=1,
        model__overrides__hidden_size=256,
        model__overrides__intermediate_size=512,
        model__overrides__head_dim=64,
    )
    plan = build(resolve(config))
    with jax.set_mesh(plan.mesh):
        counted = plan.step.lower(*plan.abstract_arguments()).cost_analysis()["flops"]
    report = dry_run(config)
    assert report["flops_per_step"] == pytest.approx(counted, rel=0.15)


def test_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(run_config(tmp_path, peft={"method": "bitfit"})))
    before = tree_hash(tmp_path)
    assert main(["train", f"--config={path}", "--dry_run", "--json"]) == 0
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert report["steps"] == 12 and "⟦" in captured.err
    assert main(["data", "inspect", f"--config={path}", "--count=2"]) == 0
    shown = capsys.readouterr().out
    assert "row 1" in shown and "row 2" not in shown and "rows of 24" in shown
    assert tree_hash(tmp_path) == before


def test_what_the_mesh_cannot_do_is_listed_and_train_shows_it_once_at_its_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An axis for experts on a model without any."""
    mesh = {"fsdp": 2, "expert": 2}
    config = run_config(tmp_path, grad_accum=1, model__overrides__num_layers=1, mesh=mesh)
    out = io.StringIO()
    report = dry_run(config, Console(file=out, width=200))
    [finding] = report["findings"]
    assert finding["mesh_axis"] == finding["logical_axis"] == "expert"
    assert finding["parameter"] == "" and finding["bytes_per_device"] == 0
    assert report["mesh"] == {"data": 1, "fsdp": 2, "tensor": 1, "sequence": 1, "expert": 2}
    line = f"mesh.expert: {finding['why']}"
    assert out.getvalue().count(line) == 1
    json.dumps(report)

    def stop(*_: object) -> None:
        raise RequestError("enough seen")

    monkeypatch.setattr(recipe, "begin", stop)
    out = io.StringIO()
    with pytest.raises(RequestError, match="enough seen"):
        recipe.train(config, tmp_path / "run", console=Console(file=out, width=200))
    assert out.getvalue().count(line) == 1
