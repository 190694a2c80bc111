"""O-LoRA: a run on an earlier one's result stays away from the directions that it changed."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jaxtune
from jaxtune.cli.main import main
from jaxtune.core.errors import RequestError
from jaxtune.core.tree import flatten
from jaxtune.optim.orthogonal import overlap
from jaxtune.recipes.build import build
from jaxtune.recipes.schema.resolve import resolve
from tests.correctness import interrupts
from tests.correctness.interrupts import Workbench
from tests.correctness.runs import run_config
from tests.correctness.tiny_runs import arrays, assert_same_run, steps

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def earlier(tmp_path_factory) -> Path:
    """A finished LoRA run, and its adapter in both layouts."""
    place = tmp_path_factory.mktemp("earlier")
    jaxtune.train(run_config(place, {"method": "lora", "rank": 2}, total_steps=2), place / "run")
    for layout in ("peft", "jaxtune"):
        words = [f"--model={place / 'run'}", f"--format={layout}", f"--out={place / layout}"]
        assert main(["export", *words]) == 0
    return place


def on_top(directory: Path, earlier: Path, peft=None, **retention):
    """The config of a run on the earlier one's result."""
    directory.mkdir(exist_ok=True)
    often = {"every_steps": 2}
    config = run_config(directory, peft or {"method": "lora", "rank": 3}, checkpoint=often)
    config.retention = retention
    config.model = {"path": str(earlier / "run"), "dtype": "float32"}
    return config


def factors(workdir: Path) -> dict:
    params = flatten(jaxtune.load(workdir, dtype="float32").params)
    return {path: leaf for path, leaf in params.items() if path.endswith("/lora/a")}


@pytest.fixture(scope="module")
def bench() -> Workbench:
    return Workbench()


@pytest.fixture(scope="module")
def pushed(tmp_path_factory, earlier, bench):
    """(config, workdir) of a run that keeps away."""
    place = tmp_path_factory.mktemp("pushed")
    config = on_top(place, earlier, olora=3.0, olora_from=[str(earlier / "peft")]).to_dict()
    bench.train(config, place / "run")
    return config, place / "run"


def test_it_keeps_away(tmp_path, earlier, pushed):
    old = factors(earlier / "run")
    assert old and all(leaf.shape[-1] == 2 for leaf in old.values())
    jaxtune.train(on_top(tmp_path, earlier), tmp_path / "free")
    found = {}
    for name, workdir in (("free", tmp_path / "free"), ("pushed", pushed[1])):
        new = factors(workdir)
        found[name] = sum(float(overlap(old[path], new[path])) for path in old)
    assert found["pushed"] < 0.8 * found["free"]


def test_stopped_and_continued_it_is_the_same_run(tmp_path, pushed, bench):
    config, undisturbed = pushed
    with interrupts.after_the_row(3):
        bench.train(config, tmp_path / "run")
    assert steps(tmp_path / "run") == [2]
    bench.train(config, tmp_path / "run")
    assert len(bench.batches) == 2
    assert_same_run(undisturbed, tmp_path / "run")
    assert any("/earlier/" in name for name in arrays(undisturbed))


def test_the_earlier_factors_are_read_from_both_layouts_and_set_side_by_side(tmp_path, earlier):
    both = [str(earlier / "peft"), str(earlier / "jaxtune")]
    plan = build(resolve(on_top(tmp_path, earlier, olora=1.0, olora_from=both)))
    trained, _ = plan.parts.split(plan.parts.shapes)
    state = plan.tx.init(jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), trained))
    held, old = flatten(state[0].earlier), factors(earlier / "run")
    assert held.keys() == old.keys()
    for path, leaf in old.items():
        np.testing.assert_array_equal(held[path], np.concatenate([leaf, leaf], axis=-1))


def test_what_cannot_be_kept_away_from_is_refused(tmp_path, earlier):
    adapter = str(earlier / "peft")

    def told(peft=None, **retention):
        with pytest.raises(RequestError) as error:
            build(resolve(on_top(tmp_path / "run", earlier, peft, **retention)))
        return str(error.value)

    both = {"olora": 1.0, "olora_from": [adapter]}
    assert "retention.olora: not used by peft.method = 'ia3'" in told({"method": "ia3"}, **both)
    assert "need each other" in told(olora=1.0)
    assert "need each other" in told(olora_from=[adapter])
    assert "'pissa' starts inside" in told({"method": "lora", "variant": "pissa"}, **both)
    missing = str(tmp_path / "missing")
    assert "no such adapter directory" in told(olora=1.0, olora_from=[missing])
    # an adapter of other layers than those that are trained
    narrow, weights = tmp_path / "narrow", "jaxtune_adapter.safetensors"
    narrow.mkdir()
    spec = json.loads((earlier / "jaxtune/jaxtune_adapter.json").read_text())
    spec["method"]["targets"] = ["q_proj"]
    (narrow / "jaxtune_adapter.json").write_text(json.dumps(spec))
    held = load_file(earlier / "jaxtune" / weights)
    save_file({p: leaf for p, leaf in held.items() if "q_proj" in p}, narrow / weights)
    only = {"olora": 1.0, "olora_from": [str(narrow)]}
    apart = {"method": "lora", "rank": 2, "targets": ["up_proj"]}
    assert "has no layer in common" in told(apart, **only)
    # and one of a model of another width
    save_file(
        {p: leaf[..., 1:] for p, leaf in load_file(narrow / weights).items()}, narrow / weights
    )
    assert "want a float of shape" in told(None, **only)
