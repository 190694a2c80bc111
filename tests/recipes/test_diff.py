"""Two runs side by side."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import jaxtune
from jaxtune.cli.main import main
from tests.correctness.runs import run_config

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> tuple[Path, Path]:
    """Two runs that differ in learning rate, rank and one example."""
    root = tmp_path_factory.mktemp("runs")
    made = []
    for name, rank, rate in (("one", 3, 1e-2), ("two", 4, 2e-2)):
        (root / name).mkdir()
        config = run_config(root / name, {"method": "lora", "rank": rank}, optim={"lr": rate})
        if name == "two":
            path = root / name / "train.jsonl"
            path.write_text("".join(path.read_text().splitlines(keepends=True)[1:]))
        made.append(root / name / "run")
        jaxtune.train(config, made[-1])
    return made[0], made[1]


def test_it_names_what_differs(runs, capsys):
    assert main(["diff", *map(str, runs), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    changed = {row["key"]: (row["a"], row["b"]) for row in found["config"]}
    assert changed["peft.rank"] == (3, 4) and changed["optim.lr"] == (1e-2, 2e-2)
    assert set(changed) == {"peft.rank", "optim.lr", "data.train", "data.eval"}  # paths differ
    assert [row["key"] for row in found["data"]] == ["data"]  # the same base, the same held-out
    assert found["code"] == []
    rows = {row["key"]: row for row in found["results"]}
    assert rows["step"] == {"key": "step", "a": 4, "b": 4, "change": 0}
    loss = rows["eval/loss"]
    assert loss["change"] == pytest.approx(loss["b"] - loss["a"]) and loss["change"] != 0
    assert main(["diff", *map(str, runs)]) == 0
    shown = capsys.readouterr().out
    assert "peft.rank" in shown and "code and machine: no difference" in shown


def test_a_run_that_is_going_on_shows_what_it_has(runs, tmp_path, capsys):
    (tmp_path / "config.json").write_text((runs[0] / "config.json").read_text())
    assert main(["diff", str(runs[0]), str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["config"] == []
    assert {row["b"] for row in found["results"]} == {None}


def test_what_is_no_run_is_refused(runs, tmp_path, capsys):
    assert main(["diff", str(runs[0]), str(tmp_path)]) == 2
    assert f"{tmp_path}: RUN: holds no run" in capsys.readouterr().err
    assert main(["diff", str(runs[0])]) == 2
