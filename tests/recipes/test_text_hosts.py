"""What is measured in texts on two processes: the same as on one, and a judge is asked once."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from tests.correctness.hosts import Hosts
from tests.correctness.tiny_runs import TIMINGS, rows
from tests.recipes.test_judge import JudgeServer
from tests.rl.serving import serving

pytestmark = pytest.mark.slow
pytest.importorskip("sacrebleu")

ANSWERS = [("Once upon", " a time"), ("The cat was very", " sad"), ("They had a lot of", " fun")]


@pytest.fixture(scope="module")
def hosts(tmp_path_factory) -> Iterator[Hosts]:
    hosts = Hosts(tmp_path_factory.mktemp("logs"))
    yield hosts
    hosts.close()


def test_two_processes_measure_as_one(hosts, shared, tmp_path):
    data = tmp_path / "answers.jsonl"
    told = [json.dumps({"prompt": p, "completion": c}) for p, c in ANSWERS]
    data.write_text("".join(f"{line}\n" for line in told))
    where = [f"--data=jsonl:{data}", "--format=completion"]
    entry = {"source": f"jsonl:{data}", "format": "completion"}
    config = {
        "model": {"path": str(shared / "models/stories260k"), "dtype": "float32"},
        "peft": {"method": "lora", "rank": 2},
        "data": {"train": [entry], "eval": [entry], "seq_len": 64},
        "batch_size": 2,
        "total_steps": 1,
        "optim": {"name": "adamw", "lr": 2e-2},
        "eval": {"metrics": ["chrf"], "labels": ["auto"], "max_new_tokens": 3},
        "retention": {
            "data": [{**entry, "name": "old"}],
            "tasks": [
                {**entry, "name": "chosen", "labels": ["auto"]},
                {**entry, "name": "written"},
            ],
        },
        "mesh": {"data": 1, "fsdp": 2},
        "log": {"tensorboard": False},
    }
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    one, two = tmp_path / "one", tmp_path / "two"
    for workdir, count in ((one, 1), (two, 2)):
        run = ["train", f"--config={path}", f"--workdir={workdir}"]
        assert hosts.run(run, count, 2 // count) == [0] * count, hosts.all_said()
    ours, theirs = rows(two), rows(one)
    assert {"retention/accuracy_drop/low", "eval/labels/nll", "eval/chrf"} <= ours[-1].keys()
    for row, expected in zip(ours, theirs, strict=True):
        assert row.keys() == expected.keys()
        for name in row.keys() - {*TIMINGS}:
            assert row[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-5), name

    words = ["eval", f"--model={two}", *where, "--metrics=chrf", "--max_new_tokens=3", "--json"]
    words += ["--batch_size=2", "--against=base", "--judge_model=judge-1"]
    held = JudgeServer()
    with serving(held) as url:
        assert hosts.run([*words, f"--judge={url}"], 2) == [0, 0], hosts.all_said()
    (said,) = [x for x in hosts.said(0).splitlines() if x.startswith("{")]
    assert "{" not in hosts.said(1)
    report = json.loads(said)
    assert report["metrics"]["chrf"]["value"] == pytest.approx(ours[-1]["eval/chrf"])
    assert report["loss"] == pytest.approx(ours[-1]["eval/loss"], rel=1e-5)
    against = report["against"]
    assert against["loss"] == pytest.approx(ours[0]["retention/nll"], rel=1e-5)
    assert against["rise"] == pytest.approx(report["loss"] - against["loss"], abs=1e-6)
    judged = report["judge"]
    assert judged["wins"] + judged["losses"] + judged["ties"] == len(ANSWERS)
    requests = [body["messages"][0]["content"] for *_, body in held.asked]
    assert 0 < len(requests) <= 2 * len(ANSWERS) and len(set(requests)) == len(requests)

    # What only the first process sees go wrong ends both with its one line.
    words = ["eval", f"--model={config['model']['path']}", *where, "--limit=1"]
    words += ["--max_new_tokens=1", "--judge_model=judge-1"]
    with serving(JudgeServer()) as url:
        assert hosts.run([*words, f"--judge={url}/no"], 2) == [2, 2], hosts.all_said()
    for index in range(2):
        (line,) = [x for x in hosts.said(index).splitlines() if x.startswith("jaxtune")]
        assert line.endswith("/no/v1/chat/completions: HTTP 404 Not Found: no such path")
