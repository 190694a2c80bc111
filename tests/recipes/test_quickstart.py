"""The quickstart's story, in miniature."""

import csv
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from jaxtune.recipes.quickstart import report, story, texts
from tests.conftest import xla_flags

PAGE = Path(__file__).resolve().parents[2] / "docs/python.md"


def python(code, *arguments, cwd):
    """Runs Python on one device, as a user does, and returns what it printed."""
    environment = {**os.environ, "XLA_FLAGS": xla_flags(devices=1), "COLUMNS": "120"}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(
        command, cwd=cwd, env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    return done.stdout


def tell(workdir):
    """Tells a story of a few steps and returns what was printed."""
    code = "import sys; from jaxtune.recipes.quickstart import main; "
    code += "sys.exit(main(sys.argv[1], pretrain_steps=4, tune_steps=8))"
    return python(code, workdir, cwd=workdir.parent)


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """Returns (workdir, what was printed) of a short story."""
    workdir = tmp_path_factory.mktemp("here") / "runs/quickstart"
    workdir.mkdir(parents=True)
    return workdir, tell(workdir)


@pytest.mark.slow
def test_story_leaves_what_it_says(told):
    workdir, printed = told
    for name in ("texts", "tokenizer", "pretrain", "tune", "base", "tuned", "adapter"):
        assert (workdir / name).is_dir()
    assert (workdir / "curves.png").read_bytes().startswith(b"\x89PNG")
    summary = json.loads((workdir / "quickstart.json").read_text())
    for name in ("before", "after"):
        measured = summary[name]
        assert set(measured["losses"]) == {"questions", "corpus"}
        assert measured["asked"] == len(measured["answers"]) > 50
        for loss in measured["losses"].values():
            assert f"{loss:.3f}" in printed
    rows = list(csv.DictReader((workdir / "curves.csv").open()))
    assert {row["run"] for row in rows} == {"pretrain", "tune"}
    assert {"loss", "eval/questions/loss", "eval/corpus/loss"} <= {row["curve"] for row in rows}


@pytest.mark.slow
def test_tuning_was_stopped_and_continued(told):
    workdir, printed = told
    assert "Stopped on purpose at step" in printed
    assert json.loads((workdir / "tune/summary.json").read_text())["stop_reason"] == "finished"
    steps = [json.loads(line)["step"] for line in (workdir / "tune/metrics.jsonl").open()]
    assert steps == sorted(steps)
    assert steps[-1] == 8


@pytest.mark.slow
def test_both_runs_learn_and_tuning_starts_from_the_base(told):
    workdir, _ = told
    for run in ("pretrain", "tune"):
        rows = [json.loads(line) for line in (workdir / run / "metrics.jsonl").open()]
        losses = [row["loss"] for row in rows if "loss" in row]
        assert losses[-1] < losses[0]
    before, after = (
        json.loads((workdir / "quickstart.json").read_text())[name]["losses"]["questions"]
        for name in ("before", "after")
    )
    assert after < before


@pytest.mark.slow
def test_story_told_again_is_the_same_without_training(told):
    workdir, _ = told
    summary = json.loads((workdir / "quickstart.json").read_text())
    metrics = (workdir / "tune/metrics.jsonl").read_bytes()
    assert "Stopped on purpose" not in tell(workdir)
    assert (workdir / "tune/metrics.jsonl").read_bytes() == metrics
    repeated = json.loads((workdir / "quickstart.json").read_text())
    assert {**repeated, "seconds": 0} == {**summary, "seconds": 0}


@pytest.mark.slow
def test_python_page_is_true(told):
    workdir, _ = told
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    code = "\n".join(line[4:] for line in lines if line.startswith("    ") or not line)
    printed = python(f"{code}\nprint(result.summary['stop_reason'])", cwd=workdir.parents[1])
    assert printed.splitlines()[-1] == "finished"


def write_step(metrics, step):
    with metrics.open("a") as file:
        file.write(json.dumps({"step": step}) + "\n")


def test_stop_comes_after_the_step_and_only_inside(tmp_path):
    metrics, received = tmp_path / "metrics.jsonl", threading.Event()
    with story.stopped_after(metrics, 3):
        before = signal.signal(signal.SIGTERM, lambda *_: received.set())
        try:
            write_step(metrics, 2)
            time.sleep(0.1)
            assert not received.is_set()
            write_step(metrics, 3)
            assert received.wait(5)
        finally:
            signal.signal(signal.SIGTERM, before)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_stop_that_comes_too_late_does_nothing(tmp_path):
    metrics = tmp_path / "metrics.jsonl"
    with story.stopped_after(metrics, 3):
        write_step(metrics, 3)
        time.sleep(0.1)


def test_run_that_is_past_the_step_is_left_alone(tmp_path):
    metrics, threads = tmp_path / "metrics.jsonl", threading.active_count()
    write_step(metrics, 3)
    with story.stopped_after(metrics, 3):
        assert threading.active_count() == threads


def test_half_a_line_is_not_yet_a_step(tmp_path):
    metrics = tmp_path / "metrics.jsonl"
    write_step(metrics, 1)
    with metrics.open("a") as file:
        file.write('{"step": 5')
    assert story._last_step(metrics) == 1


@pytest.mark.smoke
def test_shipped_configs_are_valid(tmp_path):
    from jaxtune.recipes.schema.resolve import resolve

    paths = texts.write(tmp_path, count=10)
    for config in (
        story.pretrain_config(paths, tmp_path / "tokenizer"),
        story.tune_config(paths, tmp_path / "base"),
    ):
        assert resolve(config).total_steps > 0


def test_right_answers_are_counted_to_the_letter():
    questions = [
        [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}]
        for answer in ("Nora.", "Tom.", "Ada.")
    ]
    assert report.Result({}, ["Nora.", "Tom", "Ada. "]).right(questions) == 1


def test_shown_questions_begin_differently():
    starts = ["Who is it?", "Who is she?", "Where does it lie?", "Compute 1 + 1.", "Compute 2."]
    questions = [[{"role": "user", "content": start}] for start in starts]
    assert report._varied(questions, 9) == [0, 2, 3]
    assert report._varied(questions, 2) == [0, 2]
