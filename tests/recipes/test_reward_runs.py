"""Whole runs of objective reward: what they learn, resume, evaluation, use, export, refusals."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

import jaxtune
from jaxtune.cli.main import main
from jaxtune.core.errors import RequestError
from jaxtune.recipes.assemble import load_parts
from jaxtune.recipes.build import build
from jaxtune.recipes.evaluation.evaluate import evaluate
from jaxtune.recipes.export import export
from jaxtune.recipes.schema.resolve import resolve
from jaxtune.rl.rewards.scores import score
from tests.correctness import interrupts
from tests.correctness.interrupts import Workbench
from tests.correctness.pair_runs import pair_config, write_tokenizer
from tests.correctness.tiny_runs import assert_same_run

pytestmark = pytest.mark.slow

REWARD = {"name": "reward", "centering": 0.01}
PAIRS = 32
MEASURED = ("loss", "accuracy", "calibration_error", "margin", "mean")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Pairs of ten words, of which every second is preferred, so that few teach the rest."""
    directory = tmp_path_factory.mktemp("pairs")
    write_tokenizer(directory / "tokenizer")
    for name, count, seed in (("train", PAIRS, 0), ("held", 8, 1)):
        rng, rows = np.random.default_rng(seed), []
        for _ in range(count):
            sides = [
                " ".join(f"w{2 * i + side}" for i in rng.integers(0, 5, rng.integers(2, 8)))
                for side in (0, 1)
            ]
            rows.append({"prompt": "w8 w9 ", "chosen": sides[0], "rejected": sides[1]})
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (directory / f"{name}.jsonl").write_text(lines)
    return directory


@pytest.fixture(scope="module")
def bench() -> Workbench:
    return Workbench()


def config_of(directory: Path, peft="lora", **sections):
    more = {"checkpoint": {"every_steps": 4, "keep_best": "eval/accuracy", "async_save": False}}
    more |= {"eval": {"batch_size": 4, "every_steps": 4}, "total_steps": 24}
    return pair_config(directory, peft, REWARD, **(more | sections))


@pytest.fixture(scope="module")
def run(data, bench, tmp_path_factory) -> Path:
    """The workdir of a finished run."""
    workdir = tmp_path_factory.mktemp("reward") / "run"
    assert bench.train(config_of(data), workdir).summary["stop_reason"] == "finished"
    return workdir


def history(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_a_run_learns_what_is_preferred(run):
    """Even words before odd ones, on pairs that it has not seen."""
    rows = history(run)
    assert rows[0]["loss"] == pytest.approx(np.log(2), rel=1e-5)  # the head starts at 0
    held = [row for row in rows if "eval/loss" in row]
    assert {f"eval/{name}" for name in MEASURED} <= set(held[0])
    assert not any("perplexity" in name or "bin_" in name for name in held[0])
    assert held[-1]["eval/accuracy"] == 1.0
    assert held[-1]["eval/loss"] < 0.2


def test_c26_a_run_that_is_stopped_is_the_uninterrupted_one(run, data, bench, tmp_path):
    with interrupts.after_the_row(9):
        bench.train(config_of(data), tmp_path / "run")
    bench.train(config_of(data), tmp_path / "run")
    assert_same_run(run, tmp_path / "run")


def test_what_eval_measures_is_what_the_run_measured(run, data, capsys):
    source = f"jsonl:{data}/held.jsonl"
    options = ["--format=preference", "--batch_size=3", "--json"]
    assert main(["eval", f"--model={run}", f"--data={source}", *options]) == 0
    report = json.loads(capsys.readouterr().out)
    best = max(
        (row for row in history(run) if "eval/loss" in row),
        key=lambda row: (row["eval/accuracy"], row["step"]),
    )
    same = [row for row in history(run) if row.get("eval/accuracy") == best["eval/accuracy"]]
    losses = [row["eval/loss"] for row in same]
    assert any(report["loss"] == pytest.approx(loss, rel=1e-5) for loss in losses)
    assert report["accuracy"] == best["eval/accuracy"]
    assert 0 <= report["calibration_error"] <= 1
    assert "perplexity" not in report


def test_scores_are_those_of_training_and_order_the_pairs(run, data):
    lm = jaxtune.load(run, dtype="float32")
    pairs = [json.loads(line) for line in (data / "held.jsonl").read_text().splitlines()]
    chosen, rejected = (
        lm.scores([f"{pair['prompt']}{pair[side]}" for pair in pairs])
        for side in ("chosen", "rejected")
    )
    assert (chosen > rejected).all()
    report = evaluate(
        model=run, data=f"jsonl:{data}/held.jsonl", format="preference", dtype="float32"
    )
    assert report["margin"] == pytest.approx((chosen - rejected).mean(), rel=1e-4)


def words(rng, side: int) -> str:
    """A few of the words that are preferred, or of the others."""
    return " ".join(f"w{2 * i + side}" for i in rng.integers(0, 5, rng.integers(1, 4)))


@pytest.mark.parametrize("format", ["ranked", "stepwise"])
def test_lists_and_steps_are_learned_and_measured(format, data, tmp_path):
    """Lists of two to four, their order told by scores; steps of which each is right or wrong."""
    for name, count, seed in (("train", PAIRS, 0), ("held", 8, 1)):
        rng, lines = np.random.default_rng(seed), []
        for number in range(count):
            sides = rng.permutation([0] * (1 + number % 3) + [1])
            if format == "ranked":  # the more of the others' words, the worse
                sides = rng.permutation(2 + number % 3)
                texts = [" ".join(["w2"] * (4 - n) + ["w3"] * n) for n in sides]
                row = {"completions": texts, "scores": [-float(n) for n in sides]}
            else:
                texts = [words(rng, side) for side in sides]
                row = {"completions": texts, "labels": [side == 0 for side in sides.tolist()]}
            lines.append(json.dumps({"prompt": "w8 w9 "} | row) + "\n")
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    entries = {
        part: [{"source": f"jsonl:{tmp_path}/{name}.jsonl", "format": format}]
        for part, name in (("train", "train"), ("eval", "held"))
    }
    config = config_of(data, data=entries | {"seq_len": 48}, checkpoint={})
    result = jaxtune.train(config | {"objective": {"name": "reward"}}, tmp_path / "run")
    assert result.history[0]["loss"] == pytest.approx(np.log(2), rel=1e-5)
    assert result.history[-1]["eval/accuracy"] > 0.9
    report = evaluate(
        model=tmp_path / "run",
        data=f"jsonl:{tmp_path}/held.jsonl",
        format=format,
        dtype="float32",
        batch_size=3,
    )
    for name in ("loss", "accuracy"):
        assert report[name] == pytest.approx(result.history[-1][f"eval/{name}"], rel=1e-5)


def rewarded_by(run: Path, data: Path) -> dict:
    """The config of a GRPO run on the pairs' prompts whose reward is the reward model."""
    path = data / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"w8 w{i} "}) + "\n" for i in range(4)))
    reward = {"function": "reward_model", "arguments": {"path": str(run)}}
    objective = {"name": "grpo", "rewards": [reward], "prompts": 2, "samples": 2}
    config = pair_config(data, {"method": "lora", "rank": 3}, objective | {"max_new_tokens": 4})
    config["data"] = {
        "train": [{"source": f"jsonl:{path}", "format": "prompt"}],
        "seq_len": 12,
    }
    return {name: section for name, section in config.items() if name != "eval"}


def test_it_rewards_the_samples_of_a_run_by_its_scores(run, data):
    """Within the time limit of a reward, and so in a thread of its own."""
    plan = build(resolve(rewarded_by(run, data)))
    (reward,) = plan.data.rewards
    assert reward.timeout is not None
    pairs = [json.loads(line) for line in (data / "held.jsonl").read_text().splitlines()]
    prompts, chosen, rejected = zip(*(pair.values() for pair in pairs), strict=True)
    with jax.set_mesh(plan.mesh):
        found = score([reward], prompts * 2, chosen + rejected, {})
    texts = [p + c for p, c in zip(prompts * 2, chosen + rejected, strict=True)]
    wanted = jaxtune.load(run, dtype="float32").scores(texts)
    np.testing.assert_allclose(found.total, wanted, rtol=1e-5)
    assert (found.total[: len(pairs)] > found.total[len(pairs) :]).all()


def test_packed_pairs_that_share_a_prompt_have_the_same_loss(data):
    """Each side sees the prompt and itself alone, wherever it stands."""
    found = []
    for packing in (False, True):
        plan = build(resolve(config_of(data, "full", data={"packing": packing})))
        params = load_parts(plan.base, plan.parts, plan.mesh, 0, None)
        params["score"]["kernel"] += np.linspace(-1, 1, 32, dtype=np.float32)[:, None]
        count = plan.data.stream.rows_per_epoch(0)
        with jax.set_mesh(plan.mesh):
            trainable, frozen = plan.parts.split(params)
            batch = plan.data.stream.batch(0, count)
            loss, metrics = plan.evaluation(trainable, frozen, batch)
        found.append((float(loss.sum), float(loss.weight), float(metrics["margin"].sum)))
        assert ("branches" in batch) == packing
    assert found[0][1] == found[1][1] == PAIRS
    np.testing.assert_allclose(found[0], found[1], rtol=1e-4)


@pytest.mark.parametrize("format", ["hf", "peft", "jaxtune"])
def test_exports_are_read_back_and_described(format, run, tmp_path):
    out = tmp_path / "out"
    report = export(run, format, out)
    assert report["max_logit_error"] <= report["bound"]
    card = (out / "README.md").read_text()
    assert "pipeline_tag: text-classification" in card and "It is a reward model" in card
    assert ("AutoModelForSequenceClassification" in card) == (format == "hf")
    if format == "hf":
        config = json.loads((out / "config.json").read_text())
        tokenizer = json.loads((out / "tokenizer_config.json").read_text())
        assert config["pad_token_id"] == 1  # no text ends with BOS, every completion with EOS
        assert tokenizer["pad_token"] == "<s>"
        texts = ["w2 w4 w6", "w3 </s>"]
        ours, theirs = (jaxtune.load(p, dtype="float32").scores(texts) for p in (run, out))
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def test_a_reward_model_is_refused_where_text_is_written(run, tmp_path, capsys):
    for command in (
        ["generate", f"--model={run}", "--prompt=w1"],
        ["export", f"--workdir={run}", "--format=gguf", f"--out={tmp_path / 'gguf'}"],
    ):
        assert main(command) == 2
        assert "reward model" in capsys.readouterr().err
    with pytest.raises(RequestError, match="a reward model reads preference"):
        evaluate(model=run, data="text:" + str(run / "config.json"), format="text")


def test_runs_build_on_each_other(run, data):
    """A reward model goes on as one, from its scores; a language model cannot come of it."""
    model = {"preset": None, "overrides": {}, "path": str(run)}
    plan = build(resolve(config_of(data, model=model)))
    assert plan.base.config.score_head and not plan.base.config.lm_head
    loaded = plan.base.load(lambda path: "float32", plan.mesh)
    assert np.abs(np.asarray(loaded["score"]["kernel"])).max() > 0
    with pytest.raises(RequestError, match="is a reward model, which has no logits to train"):
        build(resolve(pair_config(data, model=model)))


@pytest.mark.parametrize("verb", ["dry_run", "plan", "inspect"])
def test_the_other_verbs_know_it(verb, data, tmp_path, capsys):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config_of(data)))
    command = {
        "dry_run": ["train", f"--config={path}", f"--workdir={tmp_path / 'run'}", "--dry_run"],
        "plan": ["plan", f"--config={path}"],
        "inspect": ["data", "inspect", f"--config={path}"],
    }[verb]
    assert main(command) == 0, capsys.readouterr().err


def test_centring_is_for_pairs():
    entry = {"source": "jsonl:x", "format": "ranked"}
    config = {"model": {"path": "M"}, "objective": REWARD, "total_steps": 1, "batch_size": 1}
    config |= {"optim": {"lr": 1e-3}}
    with pytest.raises(RequestError, match=r"is for pairs, of format 'preference'"):
        resolve(config | {"data": {"train": [entry], "seq_len": 8}})
