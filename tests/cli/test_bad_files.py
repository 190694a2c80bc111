"""Files that cannot be read, written or replaced: exit code 2, one line, nothing changed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from jaxtune.recipes.build import method_of
from jaxtune.recipes.runs import open_base
from jaxtune.recipes.schema.resolve import resolve
from jaxtune.recipes.sweep.metrics import COUNTS, TIMES, metric_names
from jaxtune.recipes.train import Begun, failure, train
from jaxtune.training.loop import Totals
from jaxtune.training.workdir import MetricsFile
from tests.cli import bad_world
from tests.cli.test_bad_input import NEW, NORM, RUN, check, cut, nothing, tensors


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Model, data, adapters, and in `run` what a run leaves, but for its checkpoint."""
    directory = tmp_path_factory.mktemp("world")
    bad_world.write_world(directory)
    (directory / "run/checkpoints").mkdir(parents=True)
    config = resolve(bad_world.config()).to_dict()
    (directory / "run/config.json").write_text(json.dumps(config))
    return directory


@pytest.fixture
def here(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the world, as the current directory."""
    shutil.copytree(world, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


Case = tuple[str, Callable[[], object], tuple[str, ...], list[str]]
EXPORT = ("export", "--format=hf")


def mark(path: str) -> Callable[[], object]:
    """As if an export had written the directory."""
    return lambda: Path(path, ".jaxtune_export").touch()


def linked_model() -> None:
    mark("model")()
    Path("alias").symlink_to("model")


# What is done, the command, and what the line names and says.
OUTPUTS: list[Case] = [
    ("foreign", nothing, (*EXPORT, "--model=model", "--out=adapter"), ["adapter", "not written"]),
    ("base", mark("model"), (*EXPORT, "--workdir=run", "--out=model"), ["model.path", "replace"]),
    ("alias", linked_model, (*EXPORT, "--model=alias", "--out=model"), ["the model", "replace"]),
    (
        "adapter",
        mark("adapter"),
        (*EXPORT, "--model=model", "--adapter=adapter", "--out=./adapter"),
        ["the adapter", "replace"],
    ),
]


@pytest.mark.parametrize("case", OUTPUTS, ids=[case[0] for case in OUTPUTS])
def test_an_output_that_would_cost_something(here: Path, capfd, case: Case) -> None:
    _, act, command, texts = case
    act()
    check(capfd, command, texts)


# Flags on a config that works: (flags, what the line names and says).
STARTS: list[tuple[str, ...]] = [
    ("--config.peft.rank=5", "peft.rank", "adapter there has 4"),
    ("--config.peft.alpha=99", "peft.alpha", "adapter there has 8.0"),
    ("--config.peft.variant=dora", "peft.variant", "adapter there has 'lora'"),
    ("--config.peft.targets=['q_proj']", "peft.targets", "'q_proj'"),
]


@pytest.mark.parametrize("case", STARTS, ids=[case[0] for case in STARTS])
def test_a_setting_that_the_adapter_has_otherwise(here: Path, capfd, case) -> None:
    flag, *texts = case
    check(capfd, (*NEW, "--config.peft.init_from=adapter", flag), texts)


def test_an_adapter_says_its_method_and_the_config_how_it_trains(here: Path) -> None:
    peft = {"method": "lora", "init_from": "adapter", "dropout": 0.3, "ratio": 4.0}
    config = resolve(bad_world.config() | {"peft": peft})
    assert "rank" not in config.peft and resolve(config.to_dict()) == config
    found = method_of(config, open_base(config.model, 0))
    assert (found.rank, found.alpha, found.variant) == (4, 8.0, "lora")
    assert (found.dropout, found.ratio) == (0.3, 4.0)


def folder(path: str) -> Callable[[], object]:
    """A directory in the place of a file."""

    def act() -> None:
        Path(path).unlink(missing_ok=True)
        Path(path).mkdir()

    return act


def checkpoints_file() -> None:
    Path("run/checkpoints").rmdir()
    Path("run/checkpoints").write_text("x")


LONG = "a" * 5000
INIT = "--config.peft.init_from=adapter"
WEIGHTS, ADAPTER = "model/model.safetensors", "adapter/adapter_model.safetensors"
PREPARE = ("data", "prepare", "--format=chat", "--name=mine", "--source=jsonl:train.jsonl")
GENERATE = ("generate", "--model=model", "cat")
SWEEP = ("sweep", "--config=config.json", "--sweep.optim.lr=0.1,0.2")
# What is done, the command, and what the line names and says.
FILES: list[Case] = [
    ("weights", folder(WEIGHTS), NEW, ["model", "holds no model.safetensors"]),
    ("model_config", folder("model/config.json"), NEW, ["model", "config.json"]),
    ("tokenizer", folder("model/tokenizer.json"), NEW, ["model"]),
    ("adapter", folder(ADAPTER), (*NEW, INIT), ["adapter", "adapter_model.safetensors"]),
    ("metrics", folder("run/metrics.jsonl"), RUN, ["run/metrics.jsonl"]),
    ("checkpoints", checkpoints_file, RUN, ["run/checkpoints", "not a directory"]),
    ("generate_dir", nothing, (*GENERATE, "--out=adapter"), ["--out", "adapter", "directory"]),
    ("generate_out", nothing, (*GENERATE, "--out=/proc/x"), ["/proc"]),
    ("prepare_out", nothing, (*PREPARE, "--out=/proc/x"), ["/proc/x"]),
    ("sweep", nothing, (*SWEEP, "--workdir=/proc/x"), ["/proc"]),
    ("quickstart", nothing, ("quickstart", "--workdir=/proc/x"), ["/proc/x"]),
    ("long_source", nothing, (*NEW, f"--config.data.train[0].source=jsonl:{LONG}"), ["aaa"]),
    ("long_model", nothing, (*NEW, f"--config.model.path={LONG}"), ["aaa"]),
    ("long_workdir", nothing, (*NEW[:2], f"--workdir={LONG}"), ["aaa", "too long"]),
    ("long_config", nothing, ("train", f"--config={LONG}.json", "--workdir=new"), ["too long"]),
]


@pytest.mark.parametrize("case", FILES, ids=[case[0] for case in FILES])
def test_a_file_that_cannot_be_read_or_written(here: Path, capfd, case: Case) -> None:
    _, act, command, texts = case
    act()
    check(capfd, command, texts)


def test_the_summary_of_an_error_holds_what_is_known(here: Path) -> None:
    metrics = MetricsFile(Path("run/metrics.jsonl"))
    metrics.append({"step": 7, "loss": 2.5})
    begun = Begun(None, None, Totals(seconds=3.0), {"base": "abc"})
    note = failure(RuntimeError("out of memory"), begun, metrics, 2.0)
    assert note["stop_reason"] == "error" and note["error"] == "RuntimeError: out of memory"
    assert note["step"] == 7 and note["metrics"] == {"loss": 2.5}
    assert note["wall_seconds"] == 3.0 and note["session_seconds"] == 2.0
    assert note["fingerprints"] == {"base": "abc"}
    assert "step" not in failure(RuntimeError("out of memory"), None, metrics, 2.0)


@pytest.mark.parametrize(("begun", "code"), [(False, 2), (True, 1)])
def test_a_file_error_is_the_requests_until_the_run_has_begun(
    here: Path, cli, recipe, begun: bool, code: int
) -> None:
    def train(*_: object, **__: object) -> None:
        error = PermissionError(13, "Permission denied", "model/config.json")
        if begun:
            error.add_note("the run failed; see new/summary.json")
        raise error

    recipe("train", train=train)
    outcome = cli(*NEW)
    assert outcome.code == code
    if code == 2:
        assert outcome.err == "jaxtune: error: model/config.json: Permission denied\n"
    else:
        assert "new/summary.json" in outcome.err and "Traceback" in outcome.err


@pytest.mark.parametrize("damage", ["truncated", "missing", "shape"])
def test_a_dry_run_refuses_weights_that_a_run_would(here: Path, capfd, damage: str) -> None:
    """From the headers and the size of the file alone."""
    {
        "truncated": cut(WEIGHTS),
        "missing": tensors(lambda t: t.pop(NORM)),
        "shape": tensors(lambda t: t.update({NORM: np.ones(5, "f")})),
    }[damage]()
    texts = [WEIGHTS, "truncated" if damage == "truncated" else NORM]
    check(capfd, ("train", "--dry_run", "--config=config.json"), texts)


TRIALS = (*SWEEP, "--workdir=sweeps")
# What is done, flags beside a sweep that works, and what the line names and says.
SWEEPS: list[Case] = [
    ("metric", nothing, ("--metric=eval/los",), ["--metric", "did you mean 'eval/loss'?"]),
    ("model", nothing, ("--config.model.path=no",), ["no"]),
    ("data", nothing, ("--config.data.eval[0].source=jsonl:no",), ["data.eval[0]", "no"]),
    ("written", lambda: written([1]), (), ["sweeps/sweep.json", "1 is no trial"]),
    ("unwritten", lambda: written(None), (), ["sweeps/sweep.json", "None is no trial"]),
]


def written(trials: object) -> None:
    Path("sweeps").mkdir()
    Path("sweeps/sweep.json").write_text(json.dumps({"trials": trials}))


@pytest.mark.parametrize("case", SWEEPS, ids=[case[0] for case in SWEEPS])
def test_a_bad_sweep_is_refused_before_its_first_trial(here: Path, capfd, case: Case) -> None:
    _, act, flags, texts = case
    act()
    check(capfd, (*TRIALS, *flags), texts)


@pytest.mark.slow
def test_the_names_of_metrics_are_those_of_a_summary(here: Path) -> None:
    config = bad_world.config()
    config["data"]["eval"] += [{"source": "jsonl:train.jsonl", "format": "chat"}]
    config["eval"] = {"metrics": ["f1"], "max_new_tokens": 2}
    config["data"]["eval"][0]["by"] = "from"
    held = [bad_world.chat(text) | {"from": name} for text, name in (("moon", "a"), ("mat", "b"))]
    bad_world.write_lines(Path("held.jsonl"), held)
    names = metric_names(resolve(config | {"total_steps": 1}))
    summary = train(config | {"total_steps": 1}, "new").summary
    assert names - set(TIMES) - set(COUNTS) <= set(summary["metrics"]) <= names
    assert {f"eval/held/{value}/{name}" for value in "ab" for name in ("loss", "f1")} <= names
    metrics = summary["metrics"]
    parts = [metrics[f"eval/held/{value}/tokens"] for value in "ab"]
    losses = [metrics[f"eval/held/{value}/loss"] for value in "ab"]
    assert np.average(losses, weights=parts) == pytest.approx(metrics["eval/held/loss"], rel=1e-5)
    assert {
        "eval/f1",
        "eval/held/f1",
        "eval/loss",
        "eval/train/accuracy",
        "eval/held/perplexity",
        "loss",
    } <= names


EPOCHS = "--config.total_steps=None"
# Flags on a config that works: (flags, what the line names and says).
HUGE: list[tuple[str, ...]] = [
    ("--config.peft.rank=99999999999", "peft.rank", "2147483647"),
    ("--config.peft.rank=2000000000", "peft.rank", "more than 32"),
    ("--config.peft={'method': 'adapter', 'bottleneck': 10000}", "peft.bottleneck", "width, 32"),
    (f"--config.total_steps=1{'0' * 400}", "total_steps", "2147483647"),
    ("--config.batch_size=100000000000000", "batch_size", "2147483647"),
    ("--config.batch_size=1000000000", "batch_size", "tokens"),
    ("--config.optim.lr=1e308", "optim.lr", "3.40282e+38"),
    ("--config.optim.lr=1e-60", "optim.lr", "zero in 32 bits"),
    (EPOCHS, "--config.total_epochs=1e300", "total_epochs", "3.40282e+38"),
    (EPOCHS, "--config.total_epochs=1e9", "total_epochs", "100000 epochs"),
    (EPOCHS, "--config.total_examples=1000000000000", "total_examples", "100000 epochs"),
    (EPOCHS, "--config.total_tokens=1000000000000000", "total_tokens", "100000 epochs"),
]


@pytest.mark.parametrize("case", HUGE, ids=[case[-3][:40] for case in HUGE])
def test_a_huge_number_is_refused_at_once(here: Path, capfd, case: tuple[str, ...]) -> None:
    flags = tuple(part for part in case if part.startswith("--"))
    check(capfd, (*NEW, *flags), [part for part in case if part not in flags])


@pytest.mark.parametrize("weight", ["1e300", "1e-60", "1" + "0" * 400])
def test_a_weight_that_32_bits_do_not_hold_is_refused(here: Path, capfd, weight: str) -> None:
    Path("train.jsonl").write_text(f'{{"input_ids": [3, 4], "loss_mask": [0, {weight}]}}\n')
    flag = "--config.data.train[0].format=tokens"
    check(capfd, (*NEW, flag), ["train.jsonl:1", "loss_mask", "32 bits"])


DEEP = "[" * 200_000
NEW_PY = ("train", "--config=c.py", "--workdir=new")
ITSELF = "def get_config():\n    held = {}\n    held['model'] = held\n    return held\n"
LATIN = b"# -*- coding: latin-1 -*-\n# \xe9\ndef get_config():\n    return {'sede': 1}\n"
INSPECT = ("data", "inspect", "--source=jsonl:train.jsonl", "--format=chat", "--model=model")
SHARES = (*PREPARE, "--out=sets")


def written_as(path: str, content: str | bytes) -> Callable[[], object]:
    content = content.encode() if isinstance(content, str) else content
    return lambda: Path(path).write_bytes(content)


# What is done, the command, and what the line names and says.
ODD: list[Case] = [
    ("deep_config", written_as("config.json", DEEP), NEW, ["config.json", "nested too deeply"]),
    ("deep_model", written_as("model/config.json", DEEP), NEW, ["model/config.json", "JSON"]),
    ("deep_run", written_as("run/config.json", DEEP), RUN, ["run/config.json", "JSON"]),
    (
        "deep_prompts",
        written_as("p.jsonl", DEEP),
        ("generate", "--model=model", "--prompts=p.jsonl"),
        ["p.jsonl:1", "JSON"],
    ),
    ("itself", written_as("c.py", ITSELF), NEW_PY, ["c.py", "contains itself"]),
    ("latin", written_as("c.py", LATIN), NEW_PY, ["c.py:4", "sede", "'seed'"]),
    ("division", nothing, (*NEW, "--config.data.template={{ 1 / 0 }}"), ["division by zero"]),
    ("surrogate", nothing, ("generate", "--model=model", "a\udcff"), ["surrogate"]),
    ("seed", nothing, (*GENERATE, f"--seed=1{'0' * 23}"), ["--seed", "4294967295"]),
    ("top_k", nothing, (*GENERATE, f"--top_k=1{'0' * 23}"), ["--top_k"]),
    ("temperature", nothing, (*GENERATE, "--temperature=nan"), ["--temperature"]),
    ("share", nothing, (*SHARES, "--splits=a=nan"), ["--splits", "nan"]),
    ("start", nothing, (*INSPECT, "--start=1000000"), ["--start", "18 examples"]),
    ("quickstart", nothing, ("quickstart", "--workdir=run"), ["--workdir", "another run"]),
]


@pytest.mark.parametrize("case", ODD, ids=[case[0] for case in ODD])
def test_what_nobody_writes_on_purpose(here: Path, capfd, recwarn, case: Case) -> None:
    _, act, command, texts = case
    act()
    check(capfd, command, texts)
    assert not recwarn
