"""A command line with stand-ins for everything that loads a model."""

from __future__ import annotations

import dataclasses
import importlib
import json
import pathlib
import sys
import types
from typing import Any

import pytest

from jaxtune.cli.main import main

CONFIG = '''"""A config for tests."""

import ml_collections


def get_config(name="first"):
    config = ml_collections.ConfigDict()
    config.model = {"path": "/models/" + name}
    config.peft = {"method": "lora", "rank": 8}
    config.data = {
        "train": [{"source": "jsonl:a.jsonl", "format": "chat"}],
        "eval": [{"source": "jsonl:b.jsonl", "format": "chat"}],
        "seq_len": 64,
    }
    config.batch_size = 4
    config.total_epochs = 1
    config.optim = {"lr": 1e-3}
    return config
'''


@dataclasses.dataclass
class Outcome:
    code: int
    out: str
    err: str


@pytest.fixture
def config_path(tmp_path: pathlib.Path) -> pathlib.Path:
    path = tmp_path / "config.py"
    path.write_text(CONFIG)
    return path


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]):
    """Runs the command line in this process."""

    def run(*arguments: object) -> Outcome:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return run


@pytest.fixture
def refused(cli):
    """Runs a command that must be refused, and returns its one line."""

    def run(*arguments: object) -> str:
        outcome = cli(*arguments)
        assert outcome.code == 2, outcome
        assert outcome.out == ""
        assert outcome.err.startswith("jaxtune: error: ") and outcome.err.count("\n") == 1
        return outcome.err.removeprefix("jaxtune: error: ").rstrip("\n")

    return run


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch):
    """Puts a module of stand-ins in the place of `jaxtune.recipes.NAME`."""

    def replace(name: str, **members: Any) -> None:
        module = types.ModuleType(f"jaxtune.recipes.{name}")
        folder, _, own = module.__name__.rpartition(".")
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setattr(importlib.import_module(folder), own, module, raising=False)

    return replace


@dataclasses.dataclass
class Training:
    """Stands for `recipes.train`; the loss is the learning rate."""

    calls: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    stop: str = "finished"

    def train(self, config: Any, workdir: Any, *, console: Any = None, **options: Any):
        self.calls.append({"config": config, "workdir": workdir, **options})
        summary = {"stop_reason": self.stop, "step": 3, "metrics": {"eval/loss": config.optim.lr}}
        pathlib.Path(workdir).mkdir(parents=True, exist_ok=True)
        (pathlib.Path(workdir) / "summary.json").write_text(json.dumps(summary))
        return types.SimpleNamespace(summary=summary, history=[])

    def dry_run(self, config: Any, console: Any) -> dict[str, Any]:
        self.calls.append({"config": config, "dry_run": True})
        console.print("looks fine")
        return {"tokens_per_step": 256}


@pytest.fixture
def training(recipe) -> Training:
    stand_in = Training()
    recipe("train", train=stand_in.train)
    recipe("dry_run", dry_run=stand_in.dry_run)
    recipe("sweep.metrics", metric_names=lambda config: {"eval/loss"})
    return stand_in
