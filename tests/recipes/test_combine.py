"""Runs drawn towards their base, and merged: against the weights, one by one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import jaxtune
from jaxtune.cli.main import main
from jaxtune.core.tree import flatten
from tests.correctness.runs import base_params, run_config

pytestmark = pytest.mark.slow
IDS = np.random.default_rng(0).integers(0, 30, (2, 10))


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    """Finished runs of one base; `stranger` is of another."""
    made, root = {}, tmp_path_factory.mktemp("runs")
    for name, peft, seed in (
        ("full", {"method": "full"}, 0),
        ("lora", {"method": "lora", "rank": 3}, 0),
        ("prompt", {"method": "prompt", "num_tokens": 2}, 0),
        ("stranger", {"method": "full"}, 1),
    ):
        (root / name).mkdir()
        config = run_config(root / name, peft)
        config.seed = seed
        jaxtune.train(config, root / name / "run")
        made[name] = root / name / "run"
    return made


def weights(path) -> dict[str, np.ndarray]:
    lm = jaxtune.load(path, dtype="float32")
    merged = lm.method.merge(lm.params)
    return {name: np.asarray(leaf) for name, leaf in flatten(merged).items()}


def export(*words) -> int:
    return main(["export", *map(str, words)])


@pytest.fixture(scope="module")
def base() -> dict[str, np.ndarray]:
    return {name: np.asarray(leaf) for name, leaf in flatten(base_params()[1]).items()}


@pytest.mark.parametrize("name", ["full", "lora"])
def test_a_share_of_what_tuning_changed(runs, base, tmp_path, name):
    out = tmp_path / "out"
    assert export(f"--model={runs[name]}", "--format=hf", "--tuned_share=0.25", f"--out={out}") == 0
    tuned, found = weights(runs[name]), weights(out)
    for path, weight in found.items():
        wanted = base[path] + 0.25 * (tuned[path] - base[path])
        np.testing.assert_allclose(weight, wanted, atol=1e-6)
    assert any(not np.array_equal(found[path], base[path]) for path in found)


def test_an_adapter_drawn_towards_the_base_stays_an_adapter(runs, base, tmp_path):
    """One number: B times the share."""
    words = [f"--model={runs['lora']}", "--tuned_share=0.5"]
    assert export(*words, "--format=peft", f"--out={tmp_path / 'peft'}") == 0
    assert export(*words, "--format=hf", f"--out={tmp_path / 'hf'}") == 0
    lm = jaxtune.load(runs["lora"], dtype="float32").use(None)
    adapted = lm.add_adapter("half", tmp_path / "peft").use("half").logits(IDS)
    whole = jaxtune.load(tmp_path / "hf", dtype="float32").logits(IDS)
    np.testing.assert_allclose(adapted, whole, atol=1e-4)


@pytest.mark.parametrize("how", ["soup", "ties", "dare"])
def test_runs_of_one_base_are_merged(runs, base, tmp_path, how):
    out = tmp_path / "out"
    words = [f"--model={runs['full']}", f"--with={runs['lora']}", f"--merge={how}"]
    assert export(*words, "--format=hf", f"--out={out}") == 0
    one, two, found = weights(runs["full"]), weights(runs["lora"]), weights(out)
    name = "blocks/mlp/up_proj/kernel"
    vectors = np.stack([one[name] - base[name], two[name] - base[name]])
    change = found[name] - base[name]
    if how == "soup":
        np.testing.assert_allclose(change, vectors.mean(axis=0), atol=1e-6)
    elif how == "ties":  # half of each vector is trimmed, so that some elements stay the base's
        assert 0.2 < (np.abs(change) < 1e-7).mean() < 0.6
    else:
        assert 0.1 < (np.abs(change) < 1e-7).mean() < 0.4
    assert "merge" in (out / "README.md").read_text()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--with=stranger"], "with: was tuned from other base weights"),
        (["--with=prompt"], "the method 'prompt' adds no change of weights"),
        (["--with=nowhere"], "holds no run"),
        (["--merge=ties"], "--merge: needs --with=RUN"),
        (["--with=lora", "--density=0.1"], "--density: is used by --merge=ties"),
        (["--with=lora", "--merge=tise"], "merge: 'tise' is none of soup, ties, dare"),
        (["--tuned_share=-1"], "tuned_share: -1.0 is not in 0..2"),
        (["--with=lora", "--merge=dare", "--density=0"], "density: 0.0 is not above 0"),
    ],
)
def test_what_cannot_be_mixed_is_refused(runs, tmp_path, capsys, words, told):
    known = {f"--with={name}": f"--with={path}" for name, path in runs.items()}
    words = [known.get(word, word) for word in words]
    assert export(f"--model={runs['full']}", "--format=hf", f"--out={tmp_path / 'x'}", *words) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
