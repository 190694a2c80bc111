"""`eval` on pairs: of a DPO run and of a model; the KL from the base with shared prompts."""

from __future__ import annotations

import json

import numpy as np
import pytest

import jaxtune
from jaxtune.cli.main import main
from jaxtune.core.tree import flatten, unflatten
from jaxtune.recipes.assemble import load_parts
from jaxtune.recipes.build import build
from jaxtune.recipes.schema.resolve import resolve
from tests.correctness.pair_runs import pair_config

pytestmark = pytest.mark.slow
BETA = 0.1


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A DPO run of a LoRA, and its held-out pairs."""
    directory = tmp_path_factory.mktemp("pairs")
    config = pair_config(directory, {"method": "lora", "rank": 3}, optim={"lr": 5e-2})
    summary = jaxtune.train(config, directory / "run").summary
    return directory, summary


def sums_of(lm, directory):
    """[pairs, 2] log-probabilities of whole completions, and their lengths, one at a time."""
    sums, lengths = [], []
    for line in (directory / "held.jsonl").read_text().splitlines():
        row = json.loads(line)
        for side in ("chosen", "rejected"):
            ids = [*lm.tokenizer.encode(row["prompt"] + row[side]), lm.tokenizer.eos_id]
            start = len(lm.tokenizer.encode(row["prompt"]))
            logprobs = np.asarray(lm.logprobs([ids]))[0]
            sums.append(float(logprobs[start - 1 :].sum()))
            lengths.append(len(ids) - start)
    return np.array(sums).reshape(-1, 2), np.array(lengths).reshape(-1, 2)


def evaluated(words, capsys):
    assert main(["eval", *map(str, words), "--dtype=float32", "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_dpo_run_is_measured_by_its_own_loss(run, capsys):
    directory, summary = run
    words = [f"--model={directory / 'run'}", f"--data=jsonl:{directory / 'held.jsonl'}"]
    found = evaluated([*words, "--format=preference", "--batch_size=2"], capsys)
    lm = jaxtune.load(directory / "run", dtype="float32")
    gains = sums_of(lm, directory)[0] - sums_of(lm.use(None), directory)[0]
    margins = BETA * (gains[:, 0] - gains[:, 1])
    assert found["loss"] == pytest.approx(np.mean(np.log1p(np.exp(-margins))), rel=1e-4)
    assert found["accuracy"] == pytest.approx(np.mean(margins > 0))
    assert found["margin"] == pytest.approx(np.mean(margins), abs=1e-4)
    assert "perplexity" not in found
    # the same as the run measured itself, and without --data
    assert found["loss"] == pytest.approx(summary["metrics"]["eval/loss"], rel=1e-4)
    assert evaluated([f"--workdir={directory / 'run'}"], capsys)["loss"] == pytest.approx(
        found["loss"], rel=1e-5
    )


def test_a_model_is_measured_by_which_side_is_likelier(run, tmp_path, capsys):
    directory, _ = run
    out = tmp_path / "merged"
    assert main(["export", f"--model={directory / 'run'}", "--format=hf", f"--out={out}"]) == 0
    capsys.readouterr()
    words = [f"--model={out}", f"--data=jsonl:{directory / 'held.jsonl'}", "--format=preference"]
    found = evaluated(words, capsys)
    sums, lengths = sums_of(jaxtune.load(out, dtype="float32"), directory)
    assert found["loss"] == pytest.approx(-sums[:, 0].sum() / lengths[:, 0].sum(), rel=1e-4)
    assert found["accuracy"] == pytest.approx(np.mean(sums[:, 0] > sums[:, 1]))
    means = sums / lengths
    assert found["accuracy_per_token"] == pytest.approx(np.mean(means[:, 0] > means[:, 1]))


def test_the_kl_from_the_base_of_pairs(tmp_path):
    """A term beside the preference loss; shared prompts change nothing."""
    means = []
    for packing in (False, True):
        config = pair_config(tmp_path, {"method": "lora", "rank": 3}, data={"packing": packing})
        config["data"]["shuffle"], config["retention"] = False, {"kl": 0.5}
        plan = build(resolve(config))
        params = flatten(load_parts(plan.base, plan.parts, plan.mesh, 0, None))
        noisy = {path: x + 0.3 if "lora/b" in path else x for path, x in params.items()}
        trainable, frozen = plan.parts.split(unflatten(noisy))
        rows = plan.data.stream.rows_per_epoch(0)
        terms, _ = plan.loss(trainable, frozen, plan.data.stream.batch(0, rows), None)
        assert float(terms["preference"].weight) == 16
        means.append(float(terms["retention_kl"].mean()))
    assert means[0] > 1e-3 and means[1] == pytest.approx(means[0], rel=1e-4)
