"""`jaxtune eval --metrics --labels` on a real model: what it writes, and which label it chooses."""

from __future__ import annotations

import gzip
import json

import numpy as np
import pytest

import jaxtune
from jaxtune.cli.main import main
from jaxtune.evaluate.text_metrics import measure

MESSAGES = 10


@pytest.fixture(scope="module")
def world(shared, tmp_path_factory):
    """(words of the command, the records): messages of SMS Spam, each spam or ham."""
    path = shared / "data/classification/sms_spam.tsv.gz"
    lines = gzip.decompress(path.read_bytes()).decode().splitlines()
    parts = [line.split("\t") for line in lines]
    chosen = [p for p in parts if p[0] == "spam"][:4] + [p for p in parts if p[0] == "ham"][:6]
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


@pytest.mark.slow
def test_labels_are_chosen_by_the_likelihood_of_the_whole_completion(world, lm, capsys):
    words, rows, _ = world
    found = evaluated(capsys, [*words, "--labels=auto", "--batch_size=3"])["labels"]
    assert found["names"] == ["ham", "spam"]
    table = np.zeros((MESSAGES, 2))
    for number, row in enumerate(rows):
        start = len(lm.tokenizer.encode(row["prompt"]))
        for place, label in enumerate((" ham", " spam")):
            ids = [*lm.tokenizer.encode(row["prompt"] + label), lm.tokenizer.eos_id]
            table[number, place] = np.asarray(lm.logprobs([ids]))[0, start - 1 :].sum()
    truth = np.array([[" ham", " spam"].index(row["completion"]) for row in rows])
    odds = np.exp(table) / np.exp(table).sum(axis=1, keepdims=True)
    hits = table.argmax(axis=1) == truth
    assert found["accuracy"]["value"] == hits.mean()
    assert found["nll"]["value"] == pytest.approx(
        -np.log(odds[np.arange(MESSAGES), truth]).mean(), rel=1e-4
    )
    assert np.trace(found["confusion"]) == hits.sum()
    assert found["accuracy"]["low"] <= hits.mean() <= found["accuracy"]["high"]
    named = evaluated(capsys, [*words, "--labels=spam,ham,neither"])["labels"]
    assert named["by_label"]["spam"]["examples"] == 4 and len(named["confusion"]) == 3


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


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--metrics=f2"], "--metrics: unknown metric 'f2' (did you mean 'f1'?)"),
        (["--metrics="], "--metrics: names no metric"),
        (["--labels=ham"], "--labels: expected two labels or more; got ham"),
        (["--labels=ham,spma"], "sms.jsonl:1: --labels: the completion 'spam' is none of the"),
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
