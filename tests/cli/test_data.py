"""`jaxtune data`: prepare and inspect."""

from __future__ import annotations

import json
import pathlib

import pytest


@pytest.fixture
def tokens(tmp_path: pathlib.Path) -> pathlib.Path:
    path = tmp_path / "tokens.jsonl"
    path.write_text("".join(json.dumps({"input_ids": [1, 2, i]}) + "\n" for i in range(3, 13)))
    return path


def test_prepare_writes_a_dataset_that_inspect_reads(cli, tokens, tmp_path: pathlib.Path) -> None:
    out = tmp_path / "datasets"
    outcome = cli(
        "data", "prepare", f"--source=jsonl:{tokens}", "--format=tokens", f"--out={out}",
        "--name=mine", "--splits=train=0.8,test=0.2",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    source = f"tfds:{out}/mine:test"
    assert f"{source}  2 examples" in outcome.out
    outcome = cli("data", "inspect", f"--source={source}", "--format=tokens", "--count=1")
    assert outcome.code == 0, outcome.err
    assert "1 ⟦2 " in outcome.out


def test_inspect_shows_the_rows_of_a_config(cli, tokens, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "config.json"
    config = {
        "model": {"preset": "tiny-1m"},
        "data": {
            "train": [{"source": f"jsonl:{tokens}", "format": "tokens"}],
            "seq_len": 8,
            "packing": True,
        },
        "batch_size": 1,
        "total_steps": 1,
        "optim": {"lr": 1e-3},
    }
    path.write_text(json.dumps(config))
    outcome = cli("data", "inspect", f"--config={path}", "--count=1", "--config.seed=2")
    assert outcome.code == 0, outcome.err
    assert "segment 2" in outcome.out


def test_a_damaged_line_is_named(refused, tokens) -> None:
    tokens.write_text(tokens.read_text() + "{\n")
    assert f"{tokens}:11" in refused(
        "data", "inspect", f"--source=jsonl:{tokens}", "--format=tokens"
    )


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([], "expected prepare, inspect, doctor, teacher or replay"),
        (["inspct"], "did you mean 'inspect'?"),
        (["prepare"], "--source: is missing"),
        (["prepare", "--source=x"], "did you mean 'jsonl:x'?"),
        (["prepare", "--source=jsonl:x", "--format=chta"], "did you mean 'chat'?"),
        (["prepare", "--source=jsonl:x", "--format=chat"], "--out: is missing"),
        (["inspect", "--source=jsonl:x", "--format=chat"], "--model: is missing"),
        (["inspect", "--source=jsonl:x", "--format=tokens", "--start=-1"], "--start"),
        (["inspect", "--config=x", "--model=y"], "--model: is the config's"),
        (["inspect", "--source=jsonl:/no/such", "--format=tokens"], "/no/such"),
    ],
)
def test_data_refuses(refused, arguments: list[str], text: str) -> None:
    assert text in refused("data", *arguments)


@pytest.mark.parametrize("splits", ["train", "train=x", "=1", "a=0.5,a=0.5", "a=0.5,b=0.2"])
def test_bad_splits_are_refused(refused, tokens, tmp_path, splits: str) -> None:
    out = tmp_path / "datasets"
    command = ("data", "prepare", f"--source=jsonl:{tokens}", "--format=tokens", "--name=mine")
    assert "splits" in refused(*command, f"--out={out}", f"--splits={splits}")
    assert not out.exists()
