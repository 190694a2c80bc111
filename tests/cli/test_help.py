"""The examples of every `--help` work as printed, given a model and a file."""

from __future__ import annotations

import io
import re
import shlex
import shutil
import types
from pathlib import Path
from typing import Any

import pytest

import jaxtune.data.prepare
from jaxtune.cli.main import main
from jaxtune.recipes.schema.resolve import resolve
from tests.cli import bad_world

ROOT = Path(__file__).resolve().parents[2]
VERBS = (
    ("--help",),
    ("train", "--help"),
    ("eval", "--help"),
    ("generate", "--help"),
    ("export", "--help"),
    ("data", "--help"),
    ("data", "prepare", "--help"),
    ("data", "inspect", "--help"),
    ("data", "doctor", "--help"),
    ("data", "replay", "--help"),
    ("sweep", "--help"),
    ("diff", "--help"),
    ("quickstart", "--help"),
)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the examples name: MODEL_DIR, FILE, DIR, a run, prompts and the shipped configs."""
    directory = tmp_path_factory.mktemp("world")
    bad_world.write_world(directory)
    for name, stands_for in (("model", "MODEL_DIR"), ("train.jsonl", "FILE"), ("adapter", "DIR")):
        (directory / name).rename(directory / stands_for)
    (directory / "in.jsonl").write_text('{"prompt": "the cat"}\n')
    shutil.copytree(directory / "MODEL_DIR", directory / "runs/first")
    shutil.copytree(ROOT / "configs", directory / "configs")
    return directory


@pytest.fixture
def works(world: Path, recipe, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stand-ins for what would take long; they note that they were called."""
    monkeypatch.chdir(world)
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    called: list[str] = []

    def noting(name: str, result: Any):
        def call(*_: Any, **__: Any) -> Any:
            called.append(name)
            return result

        return call

    lm = types.SimpleNamespace(
        tokenizer=types.SimpleNamespace(chat_template="a template"),
        generate=lambda prompts, **_: list(prompts),
    )
    summary = {"stop_reason": "finished", "step": 1, "metrics": {"loss": 1.0, "eval/loss": 1.0}}
    recipe("train", train=noting("train", types.SimpleNamespace(summary=summary)))
    recipe("evaluation.evaluate", evaluate=noting("evaluate", {"loss": 1.0}))
    recipe("export", export=noting("export", {"out": "x"}))
    recipe("load", load=noting("load", lm))
    recipe("quickstart", main=noting("quickstart", 0))
    samples = {"num": 1, "new_tokens": 1, "ended": 1, "longest": 1}
    recipe("retention.replay", write_replay=noting("write_replay", samples))
    recipe("report.diff", diff=noting("diff", {"config": []}))
    recipe("sweep.metrics", metric_names=lambda config: names_of(config))
    prepared = {"directory": "x", "splits": {"train": 1}}
    monkeypatch.setattr(jaxtune.data.prepare, "prepare", noting("prepare", prepared))
    return called


def names_of(config: Any) -> set[str]:
    """As `sweep.metrics.metric_names`, for a config with or without evaluation data."""
    return {"loss", "eval/loss"} if resolve(config).data.eval else {"loss"}


def examples(text: str) -> list[list[str]]:
    """Returns the words of each command after `example:`."""
    joined = re.sub(r"\\\n\s*", "", text.split("example:\n")[1])
    return [shlex.split(line)[1:] for line in re.findall(r"^  (jaxtune .*)$", joined, re.MULTILINE)]


@pytest.mark.parametrize("verb", VERBS, ids=" ".join)
def test_examples(verb: tuple[str, ...], works, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(list(verb)) == 0
    found = examples(capsys.readouterr().out)
    assert found
    for words in found:
        code = main(words)
        out, err = capsys.readouterr()
        assert code == 0 and not err, (words, out, err)
