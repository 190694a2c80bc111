"""`jaxtune data doctor`: flags, exit codes, files."""

from __future__ import annotations

import json
import pathlib

import pytest

from jaxtune.cli.main import main
from tests.data.conftest import write_tokenizer


@pytest.fixture
def rows(tmp_path: pathlib.Path) -> pathlib.Path:
    path = tmp_path / "rows.jsonl"
    lines = [
        {"prompt": f"What is {i} and {i}?", "completion": f"It is {2 * i}."} for i in range(1, 9)
    ]
    lines.append(lines[0])
    lines.append({"prompt": "Who?", "completion": "Ask a.b@c.org."})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_it_reports_and_exits_as_asked(cli, rows, tmp_path) -> None:
    command = ["data", "doctor", f"--data=jsonl:{rows}", "--format=completion", "--workers=1"]
    outcome = cli(*command)
    assert outcome.code == 0, outcome.err
    assert "10 rows" in outcome.out and "rows.jsonl:9 (as rows.jsonl:1)" in outcome.out
    assert cli(*command, "--fail_on=error").code == 0
    assert cli(*command, "--fail_on=email").code == 1
    outcome = cli(
        *command,
        "--fail_on=warning",
        f"--fix={tmp_path}/out.jsonl",
        f"--json={tmp_path}/r.json",
        f"--html={tmp_path}/r.html",
    )
    assert outcome.code == 1 and "--fail_on" in outcome.err
    report = json.loads((tmp_path / "r.json").read_text())
    assert {e["kind"] for e in report["findings"]} == {"duplicate", "email"}
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 9
    assert (tmp_path / "r.html").read_text().startswith("<!DOCTYPE html>")


def test_splits_evaluations_words_and_groups(cli, rows, tmp_path) -> None:
    quiz = tmp_path / "quiz.jsonl"
    quiz.write_text('{"q": "What is 3 and 3?", "a": "6"}\n{"q": "What is 77 and 77?"}\n')
    (tmp_path / "words.txt").write_text("who\n")
    (tmp_path / "groups.json").write_text('{"digits": {"two": ["2"], "three": ["3"]}}')
    outcome = cli(
        "data", "doctor", f"--data=train=jsonl:{rows}", f"--data=held=jsonl:{rows}",
        "--format=completion", f"--against=quiz=jsonl:{quiz}:q", f"--words={tmp_path}/words.txt",
        f"--groups={tmp_path}/groups.json", f"--json={tmp_path}/r.json",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    report = json.loads((tmp_path / "r.json").read_text())
    lines = {entry["kind"]: entry["lines"] for entry in report["findings"]}
    assert lines["split_leak"] == {"train": list(range(1, 11))}
    assert lines["contamination"] == {"train": [3], "held": [3]}
    assert lines["toxic"] == {"train": [10], "held": [10]}
    assert report["groups"]["digits"]["pairs"][0]["prompts"] == 1
    assert report["evaluations"][0]["items"] == 2


def test_a_config_says_what_to_look_at(cli, rows, tmp_path) -> None:
    path = tmp_path / "config.json"
    held = tmp_path / "held.jsonl"
    held.write_text(rows.read_text().splitlines()[1] + "\n")
    entry = {"format": "completion"}
    config = {
        "model": {"preset": "tiny-1m", "tokenizer": str(write_tokenizer(tmp_path / "tokenizer"))},
        "data": {
            "train": [{**entry, "source": f"jsonl:{rows}"}],
            "eval": [{**entry, "source": f"jsonl:{held}", "name": "held"}],
            "seq_len": 8,
        },
        "batch_size": 1,
        "total_steps": 1,
        "optim": {"lr": 1e-3},
    }
    path.write_text(json.dumps(config))
    command = ["data", "doctor", f"--config={path}", f"--json={tmp_path}/r.json"]
    outcome = cli(*command, "--fail_on=split_leak")
    assert outcome.code == 1, outcome.err
    report = json.loads((tmp_path / "r.json").read_text())
    assert [item["name"] for item in report["inputs"]] == ["train", "eval.held"]
    assert {"split_leak", "overlong"} <= {entry["kind"] for entry in report["findings"]}
    assert "is the config's" in cli(*command, "--seq_len=8").err


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([], "--data: is missing"),
        (["--data=jsonl:{rows}"], "--format: is missing"),
        (["--data=csv:x", "--format=text"], "--data: expected"),
        (["--data=jsonl:{rows}", "--format=chatt"], "did you mean 'chat'"),
        (["--data=jsonl:{rows}x", "--format=text"], "no such file (did you mean 'rows.jsonl'?)"),
        (["--data=jsonl:{rows}", "--format=text", "--fail_on=emial"], "did you mean 'email'"),
        (["--data=jsonl:{rows}", "--format=text", "--seq_len=9"], "needs --tokenizer"),
        (["--data=jsonl:{rows}", "--format=text", "--against=jsonl:{rows}"], "--against: expected"),
        (["--data=jsonl:{rows}", "--format=text", "--against=e=jsonl:{rows}:z"], "no field 'z'"),
        (["--data=jsonl:{rows}", "--format=text", "--fix_kinds=email"], "needs --fix"),
        (["--data=jsonl:{rows}", "--format=text", "--near=nan"], "--near: expected"),
        (["--data=jsonl:{rows}", "--format=text", "--html=/nowhere/x"], "no such directory"),
        (["--data=a=jsonl:{rows}", "--data=a=jsonl:{rows}", "--format=text"], "given twice"),
        (["--data=jsonl:{rows}", "--format=completion", "--fix={rows}"], "is a source itself"),
        (["--data=jsonl:{rows}", "--format=text", "--groups={rows}"], "--groups: not valid JSON"),
    ],
)  # fmt: skip
def test_a_wrong_request_is_told(arguments, text, rows, capsys) -> None:
    code = main(["data", "doctor", *(a.replace("{rows}", str(rows)) for a in arguments)])
    told = capsys.readouterr().err
    assert code == 2 and text in told and told.count("\n") == 1
