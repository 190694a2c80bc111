"""A run against its base: rise, interval and KL, by whole logits."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest

import jaxtune
from jaxtune.cli.main import main
from jaxtune.evaluate.bootstrap import mean_of, paired
from tests.correctness.runs import run_config

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    directory = tmp_path_factory.mktemp("run")
    config = run_config(directory, {"method": "lora", "rank": 3}, optim={"lr": 0.1})
    jaxtune.train(config, directory / "run")
    return directory


def test_the_rise_and_the_kl_are_those_of_whole_logits(run, capsys):
    words = [f"--model={run / 'run'}", f"--data=jsonl:{run / 'train.jsonl'}", "--format=tokens"]
    words += ["--dtype=float32", "--json", "--batch_size=3"]
    assert main(["eval", *words, "--against=base"]) == 0
    found = json.loads(capsys.readouterr().out)
    lm = jaxtune.load(run / "run", dtype="float32")
    base = lm.use(None)
    sums = np.zeros((3, 8))
    for number, line in enumerate((run / "train.jsonl").read_text().splitlines()):
        row = json.loads(line)
        ids, mask = np.array([row["input_ids"]]), np.array(row["loss_mask"][1:], float)
        ours, theirs = (np.asarray(jax.nn.log_softmax(m.logits(ids)[0, :-1])) for m in (lm, base))
        at = (np.arange(len(mask)), ids[0, 1:])
        kl = (np.exp(theirs) * (theirs - ours)).sum(axis=-1)
        sums[:, number] = [-(x * mask).sum() for x in (ours[at] - theirs[at], theirs[at], -kl)]
    lines = (run / "train.jsonl").read_text().splitlines()
    weight = sum(sum(json.loads(line)["loss_mask"][1:]) for line in lines)
    told = found["against"]
    assert told["rise"] == pytest.approx(sums[0].sum() / weight, rel=1e-4)
    assert told["loss"] == pytest.approx(sums[1].sum() / weight, rel=1e-4)
    assert told["kl"] == pytest.approx(sums[2].sum() / weight, rel=1e-4)
    assert told["low"] <= told["rise"] <= told["high"]
    assert found["loss"] == pytest.approx(told["loss"] + told["rise"], rel=1e-4)
    # another directory in its place, and a model without a base
    assert main(["eval", *words, f"--against={run / 'run'}"]) == 0
    same = json.loads(capsys.readouterr().out)["against"]
    assert same["rise"] == same["kl"] == 0


def test_the_interval_covers_the_truth_as_often_as_it_says():
    """Of 300 samples of 60 examples, about 95 % hold the true difference, 0.3 a token."""
    rng, hits = np.random.default_rng(0), 0
    for seed in range(300):
        weights = rng.integers(1, 9, 60).astype(float)
        hard = rng.normal(3.0, 2.0, 60) * weights  # for both models alike
        theirs = hard + rng.normal(0, 0.5, 60)
        ours = hard + 0.3 * weights + rng.normal(0, 0.5, 60)
        pair = mean_of(ours, weights), mean_of(theirs, weights)
        low, high = paired(*pair, seed, draws=400)[1:]
        hits += low <= 0.3 <= high
    assert 0.9 <= hits / 300 <= 0.98


def test_a_model_without_a_base_is_refused(run, capsys, tmp_path):
    out = tmp_path / "out"
    assert main(["export", f"--model={run / 'run'}", "--format=hf", f"--out={out}"]) == 0
    words = [f"--model={out}", f"--data=jsonl:{run / 'train.jsonl'}", "--format=tokens"]
    assert main(["eval", *words, "--against=base"]) == 2
    assert "--against: the model is no run with a base" in capsys.readouterr().err
