"""`jaxtune eval --metrics --labels` on a real model: what it writes, and which label it chooses."""

from __future__ import annotations

import gzip
import json

import numpy as np
import pytest

import jaxtune
from jaxtune.cli.main import main
from jaxtune.core.errors import RequestError
from jaxtune.data.formats import Completion
from jaxtune.data.questions import Question
from jaxtune.evaluate.text_metrics import measure
from jaxtune.recipes.evaluation.labelled import AUTO, MOST, labels_of, truth_of
from jaxtune.recipes.schema.resolve import resolve

pytest.importorskip("sacrebleu")
MESSAGES = 10


@pytest.fixture(scope="module")
def world(shared, tmp_path_factory):
    """(words of the command, the records): messages of SMS Spam, each spam or ham."""
    path = shared / "data/classification/sms_spam.tsv.gz"
    lines = gzip.decompress(path.read_bytes()).decode().splitlines()
    parts = [line.split("\t") for line in lines]
    spam, ham = ([p for p in parts if p[0] == name] for name in ("spam", "ham"))
    chosen = [*ham[:2], *spam[:4], *ham[2:6]]
    rows = [
        {"prompt": f"Message: {text[:30]} Label:", "completion": f" {label}"}
        for label, text in chosen
    ]
    data = tmp_path_factory.mktemp("data") / "sms.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = shared / "models" / "stories260k"
    words = ["eval", f"--model={model}", f"--data=jsonl:{data}", "--format=completion"]
    return [*words, "--dtype=float32", "--json"], rows, model


@pytest.fixture(scope="module")
def lm(world):
    return jaxtune.load(world[2], dtype="float32")


def evaluated(capsys, words) -> dict:
    assert main(words) == 0
    return json.loads(capsys.readouterr().out)


def by_whole_logits(lm, rows) -> tuple[np.ndarray, np.ndarray]:
    """Returns (ln p of each label with its EOS, the number of the right one)."""
    table = np.zeros((len(rows), 2))
    for number, row in enumerate(rows):
        start = len(lm.tokenizer.encode(row["prompt"]))
        for place, label in enumerate((" ham", " spam")):
            ids = [*lm.tokenizer.encode(row["prompt"] + label), lm.tokenizer.eos_id]
            table[number, place] = np.asarray(lm.logprobs([ids]))[0, start - 1 :].sum()
    return table, np.array([[" ham", " spam"].index(row["completion"]) for row in rows])


@pytest.mark.slow
def test_labels_are_chosen_by_the_likelihood_of_the_whole_completion(world, lm, capsys):
    words, rows, _ = world
    found = evaluated(capsys, [*words, "--labels=auto", "--batch_size=3"])["labels"]
    assert found["names"] == ["ham", "spam"]
    table, truth = by_whole_logits(lm, rows)
    odds = np.exp(table) / np.exp(table).sum(axis=1, keepdims=True)
    hits = table.argmax(axis=1) == truth
    assert found["accuracy"]["value"] == hits.mean()
    assert found["nll"]["value"] == pytest.approx(
        -np.log(odds[np.arange(MESSAGES), truth]).mean(), rel=1e-4
    )
    assert np.trace(found["confusion"]) == hits.sum()
    assert found["accuracy"]["low"] <= hits.mean() <= found["accuracy"]["high"]


@pytest.mark.slow
def test_what_is_written_is_what_generate_writes(world, lm, capsys):
    words, rows, _ = world
    asked = ["--metrics=exact_match,chrf", "--max_new_tokens=6", "--batch_size=4"]
    found = evaluated(capsys, [*words, *asked])
    prompts, wanted = ([row[name] for row in rows] for name in ("prompt", "completion"))
    written = lm.generate(prompts, max_new_tokens=6)
    expected = measure(["exact_match", "chrf"], written, wanted)
    for name, figure in expected.items():
        assert found["metrics"][name]["value"] == pytest.approx(figure.whole)
        assert found["metrics"][name]["low"] <= figure.whole <= found["metrics"][name]["high"]
    assert found["answers"] == {"written": MESSAGES, "cut": MESSAGES}
    # a model against itself: no rise, whatever is drawn
    told = evaluated(capsys, [*words, *asked, f"--against={world[2]}"])["against"]
    assert told["metrics"]["chrf"]["value"] == pytest.approx(expected["chrf"].whole)
    assert [told["metrics"]["chrf"][key] for key in ("rise", "low", "high")] == [0, 0, 0]
    assert told["rise"] == 0


def test_labels_are_those_of_the_data_or_those_named():
    asked = [Question(Completion("?", f" {text}\n"), (1,), f"x:{text}") for text in "bab"]
    assert labels_of((AUTO,), asked, "k") == ("a", "b")
    assert labels_of(("b", "c", "a"), asked, "k") == ("b", "c", "a")
    assert truth_of(asked, ("b", "c", "a")).tolist() == [0, 2, 0]
    with pytest.raises(RequestError, match="x:b: k: the completion 'b' is none of the labels"):
        labels_of(("a", "c"), asked, "k")
    many = [Question(Completion("?", str(n)), (1,), "x") for n in range(MOST + 1)]
    with pytest.raises(RequestError, match=f"k: {MOST + 1} distinct completions are more than"):
        labels_of((AUTO,), many, "k")


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--metrics=f2"], "--metrics: unknown metric 'f2' (did you mean 'f1'?)"),
        (["--metrics="], "--metrics: expected names"),
        (["--labels=ham"], "--labels: expected two labels or more; got ham"),
        (["--labels=ham,spma"], "sms.jsonl:3: --labels: the completion 'spam' is none of the"),
        (["--temperature=1"], "--temperature: needs --metrics"),
        (["--metrics=f1", "--top_p=0"], "--top_p: expected a number > 0"),
        (["--metrics=f1", "--format=text"], "--format: 'text' has no prompt with an answer"),
    ],
)
def test_what_cannot_be_measured_is_refused(world, capsys, flags, told):
    words = list(world[0])
    if flags[-1] == "--format=text":
        words = [w for w in words if not w.startswith(("--format", "--data"))]
        source = world[0][2].removeprefix("--data=jsonl:")
        words += [f"--data=text:{source}"]
    assert main([*words, *flags]) == 2
    assert told in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_measures_its_answers_at_each_evaluation(world, tmp_path):
    """As the model that comes out of it answers."""
    _, rows, model = world
    entry = {"source": world[0][2].removeprefix("--data="), "format": "completion"}
    asked = {"metrics": ["chrf"], "labels": ["auto"], "max_new_tokens": 3, "answers": 4}
    config = {
        "model": {"path": str(model), "dtype": "float32"},
        "peft": {"method": "full", "train": ["final_norm/scale"]},
        "data": {"train": [entry], "eval": [entry], "seq_len": 64},
        "batch_size": 4,
        "total_steps": 1,
        "optim": {"name": "adamw", "lr": 2e-2},
        "eval": asked,
        "mesh": {"data": 1, "fsdp": 1},
        "log": {"tensorboard": False},
    }
    metrics = jaxtune.train(config, tmp_path / "run").summary["metrics"]
    tuned = jaxtune.load(tmp_path / "run", dtype="float32")
    prompts, wanted = ([row[name] for row in rows[:4]] for name in ("prompt", "completion"))
    written = tuned.generate(prompts, max_new_tokens=3)
    assert metrics["eval/chrf"] == pytest.approx(measure(["chrf"], written, wanted)["chrf"].whole)
    table, truth = by_whole_logits(tuned, rows[:4])
    logprobs = table - np.log(np.exp(table).sum(axis=1, keepdims=True))
    nll = -logprobs[np.arange(4), truth].mean()
    assert metrics["eval/labels/nll"] == pytest.approx(nll, rel=1e-4)
    assert metrics["eval/labels/accuracy"] == (table.argmax(axis=1) == truth).mean()


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"metrics": ["bleau"]}, r"eval.metrics: unknown metric 'bleau' \(did you mean 'bleu'"),
        ({"max_new_tokens": 3}, "eval.max_new_tokens: needs eval.metrics"),
        ({"labels": ["a", "b"], "max_new_tokens": 3}, "eval.max_new_tokens: needs eval.metrics"),
    ],
)
def test_a_config_that_cannot_be_measured_is_refused(values, told):
    with pytest.raises(RequestError, match=told):
        resolve(minimal(values))


def test_answers_need_prompts():
    config = minimal({"labels": ["auto"]})
    with pytest.raises(RequestError, match=r"eval.labels: needs prompts with answers.*'text'"):
        resolve(config)
    config["data"].pop("eval")
    with pytest.raises(RequestError, match=r"eval.labels: needs evaluation data"):
        resolve(config)


def minimal(values: dict) -> dict:
    entry = {"source": "jsonl:x", "format": "text"}
    return {
        "model": {"path": "MODEL_DIR"},
        "data": {"train": [entry], "eval": [entry], "seq_len": 8},
        "batch_size": 1,
        "total_steps": 1,
        "optim": {"lr": 1e-3},
        "eval": values,
    }


@pytest.mark.slow
def test_a_field_parts_the_figures(world, tmp_path, capsys):
    """Each value's are those of its records alone, and the weights add up."""
    words, rows, _ = world
    parts = {"a": rows[:3], "7": rows[3:]}
    whole = [{**row, "from": 7 if name == "7" else name} for name in parts for row in parts[name]]
    (tmp_path / "all.jsonl").write_text("".join(json.dumps(row) + "\n" for row in whole))
    others = [word for word in words if not word.startswith("--data")]
    asked = [*others, "--labels=ham,spam", "--batch_size=2"]
    found = evaluated(capsys, [*asked, f"--data=jsonl:{tmp_path / 'all.jsonl'}", "--by=from"])
    assert list(found["by"]) == ["a", "7"]
    for name, some in parts.items():
        (tmp_path / "one.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
        alone = evaluated(capsys, [*asked, f"--data=jsonl:{tmp_path / 'one.jsonl'}"])
        told = found["by"][name]
        assert told["loss"] == pytest.approx(alone["loss"], rel=1e-5)
        assert told["perplexity"] == pytest.approx(alone["perplexity"], rel=1e-5)
        assert told["labels"]["confusion"] == alone["labels"]["confusion"]
    tokens = [found["by"][name]["tokens"] for name in parts]
    losses = [found["by"][name]["loss"] for name in parts]
    assert sum(tokens) == found["tokens"]
    assert np.average(losses, weights=tokens) == pytest.approx(found["loss"], rel=1e-5)
    assert main([*asked, f"--data=jsonl:{tmp_path / 'all.jsonl'}", "--by=form"]) == 2
    assert "all.jsonl:1: --by: the record has no field 'form' (did you" in capsys.readouterr().err
