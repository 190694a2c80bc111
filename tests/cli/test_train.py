"""`jaxtune train`: flags, config files, exit codes."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys

import pytest

from jaxtune.cli.main import VERBS
from jaxtune.core.errors import RequestError


def test_help_is_quick_and_shows_an_example(cli) -> None:
    for verb in ("", *VERBS):
        outcome = cli(*filter(None, (verb, "--help")))
        assert outcome.code == 0
        assert "example" in outcome.out and f"jaxtune {verb}".strip() in outcome.out


def test_help_imports_no_heavy_package() -> None:
    code = (
        "import sys; from jaxtune.cli.main import main; assert main(['train', '--help']) == 0;"
        "heavy = {'jax', 'numpy', 'transformers', 'ml_collections', 'rich'} & set(sys.modules);"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_reading_a_config_imports_no_jax(config_path: pathlib.Path) -> None:
    code = (
        "import sys; from jaxtune.cli import config_file;"
        f"config_file.load({str(config_path)!r}, [('seed', '1')]).resolve();"
        "sys.exit('jax' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_train_gets_the_complete_config(cli, training, config_path, tmp_path) -> None:
    outcome = cli(
        "train",
        f"--config={config_path}",
        "--config.peft.rank=4",
        "--config.seed",
        "7",
        "--config.data.train[0].weight=2",
        "--config.data.train.1.source=jsonl:c.jsonl",
        "--config.data.train[1].format=chat",
        "--config.data.packing",
        "--noconfig.data.shuffle",
        "--config.optim.clip_norm=None",
        "--config.optim.groups['.*lora/b'].lr_scale=2",
        f"--workdir={tmp_path / 'run'}",
    )
    assert outcome.code == 0, outcome.err
    [call] = training.calls
    config = call["config"]
    assert (config.peft.rank, config.seed, config.peft.alpha) == (4, 7, 16.0)
    assert [entry.weight for entry in config.data.train] == [2.0, 1.0]
    assert config.data.train[1].source == "jsonl:c.jsonl"
    assert config.data.packing is True and config.data.shuffle is False
    assert config.optim.clip_norm is None
    assert config.optim.groups[0].pattern == ".*lora/b"
    assert call["workdir"] == tmp_path / "run" and call["allow_change"] is False


def test_the_configs_argument_follows_a_colon(cli, training, config_path, tmp_path) -> None:
    assert cli("train", f"--config={config_path}:second", f"--workdir={tmp_path}").code == 0
    assert training.calls[0]["config"].model.path == "/models/second"


def test_a_runs_config_json_is_a_config_too(cli, training, config_path, tmp_path) -> None:
    cli("train", f"--config={config_path}", f"--workdir={tmp_path}")
    path = tmp_path / "config.json"
    path.write_text(json.dumps(training.calls[0]["config"].to_dict()))
    assert cli("train", "--config", path, "--config.seed=3", "--workdir", tmp_path).code == 0
    assert training.calls[1]["config"].seed == 3
    assert training.calls[1]["config"].peft == training.calls[0]["config"].peft


def test_json_and_dry_run_and_allow_change(cli, training, config_path, tmp_path) -> None:
    config = f"--config={config_path}"
    outcome = cli("train", config, f"--workdir={tmp_path}", "--json", "--allow_change")
    assert json.loads(outcome.out)["stop_reason"] == "finished"
    assert training.calls[-1]["allow_change"] is True
    outcome = cli("train", config, "--dry_run", "--json")
    assert outcome.code == 0 and json.loads(outcome.out) == {"tokens_per_step": 256}
    assert "looks fine" in outcome.err
    assert training.calls[-1]["dry_run"] is True


@pytest.mark.parametrize(
    ("stop", "code"),
    [("finished", 0), ("budget", 0), ("preempted", 1), ("non_finite", 1), ("error", 1)],
)
def test_the_exit_code_tells_how_the_run_ended(
    cli, training, config_path, tmp_path, stop: str, code: int
) -> None:
    training.stop = stop
    outcome = cli("train", f"--config={config_path}", f"--workdir={tmp_path}")
    told = f"jaxtune: stopped, {stop}: at step 3; see {tmp_path}/summary.json\n"
    assert (outcome.code, outcome.err) == (code, told if code else "")


def test_interruption_is_130_and_a_crash_is_1(cli, recipe, config_path, tmp_path) -> None:
    def raising(error: BaseException):
        def train(*args: object, **kwargs: object) -> None:
            raise error

        return train

    command = ("train", f"--config={config_path}", f"--workdir={tmp_path}")
    recipe("train", train=raising(KeyboardInterrupt()))
    assert cli(*command).code == 130
    recipe("train", train=raising(RuntimeError("out of memory")))
    outcome = cli(*command)
    assert outcome.code == 1 and "out of memory" in outcome.err


def test_an_error_of_the_run_that_names_a_key_gets_its_line(refused, recipe, config_path, tmp_path):
    def train(*args: object, **kwargs: object) -> None:
        raise RequestError("8 is too large for this model", key="peft.rank")

    recipe("train", train=train)
    line = refused("train", f"--config={config_path}", f"--workdir={tmp_path}")
    assert line == f"{config_path}:9: peft.rank: 8 is too large for this model"


BAD_FLAGS = [
    # arguments after `train --config=FILE --workdir=DIR`, text of the error
    (["--config.peft.rnak=4"], "--config.peft.rnak: unknown key (did you mean 'rank'?)"),
    (["--config.peft.rank=abc"], "--config.peft.rank: expected an integer ≥ 1; got 'abc'"),
    (["--config.peft.rank"], "--config.peft.rank needs a value"),
    (["--config.data.train[3].format=chat"], "3 is no index of a list of 1"),
    (["--config.data.train[0.format=chat"], "expected a.b"),
    (["--config.seed.x=1"], "--config.seed"),
    (["--config.optm.lr=1"], "--config.optm: unknown key (did you mean 'optim'?)"),
    (["--config.data.packing=maybe"], "data.packing: expected True or False; got 'maybe'"),
    (["--config.total_steps=5"], "total_steps"),
    (["--config=other.py"], "--config is given twice"),
    (["--dry-run"], "unknown flag --dry-run (did you mean '--dry_run'?)"),
    (["--dry"], "unknown flag --dry"),
    (["--sweep.seed=1,2"], "unknown flag --sweep.seed"),
    (["stray"], "unknown argument stray"),
    (["--json=3"], "--json"),
]


@pytest.mark.parametrize(("flags", "text"), BAD_FLAGS, ids=[f[0][0] for f in BAD_FLAGS])
def test_a_bad_flag_is_one_line(refused, training, config_path, tmp_path, flags, text) -> None:
    workdir = tmp_path / "run"
    line = refused("train", f"--config={config_path}", f"--workdir={workdir}", *flags)
    assert text in line
    assert not training.calls and not workdir.exists()


BAD_FILES = [
    # content of the config file, line that the error names, text
    ("def get_config(:\n", 1, "SyntaxError"),
    ("import no_such_module\n", 1, "ModuleNotFoundError"),
    ("x = 1\n", None, "has no get_config()"),
    ("def get_config():\n    return None\n", None, "returned NoneType"),
    ("def get_config():\n    return [1]\n", None, "returned list"),
    ("def get_config():\n    x = {}\n    return x['a']\n", 3, "KeyError: 'a'"),
    ("def get_config():\n    raise ValueError('two\\nlines')\n", 2, "ValueError: two lines"),
    ("def get_config():\n    raise SystemExit(3)\n", 2, "SystemExit"),
    ("def get_config(size):\n    return {}\n", None, "needs one: --config=FILE:ARG"),
    (
        "from ml_collections import ConfigDict\ndef get_config():\n    c = ConfigDict()\n"
        "    c.groups = {'a.*': {}}\n    return c\n",
        4,
        "as a list of {pattern",
    ),
    ("def get_config():\n    return {'model': {},\n        'sede': 1}\n", 3, "sede: unknown key"),
    ("def get_config():\n    return dict(\n        seed='x')\n", 3, "seed: expected an integer"),
]


@pytest.mark.parametrize(("content", "line", "text"), BAD_FILES)
def test_a_bad_config_file_is_one_line_that_names_its_line(
    refused, tmp_path, content: str, line: int | None, text: str
) -> None:
    path = tmp_path / "bad.py"
    path.write_text(content)
    error = refused("train", f"--config={path}", f"--workdir={tmp_path / 'run'}")
    assert error.startswith(f"{path}:{line}: " if line else f"{path}: ")
    assert text in error


def test_a_missing_file_is_named_with_the_nearest(refused, config_path, tmp_path) -> None:
    line = refused("train", f"--config={tmp_path / 'confg.py'}", f"--workdir={tmp_path}")
    assert "no such config file (did you mean 'config.py'?)" in line
    assert "is a directory" in refused("train", f"--config={tmp_path}", "--workdir=x")


def test_other_files_are_refused(refused, tmp_path) -> None:
    text = tmp_path / "config.txt"
    text.write_text("x")
    assert "a config is a Python file" in refused("train", f"--config={text}", "--workdir=x")
    damaged = tmp_path / "config.json"
    damaged.write_text('{"seed": 1,\n')
    assert f"{damaged}:2: is not JSON" in refused("train", f"--config={damaged}", "--workdir=x")


def test_an_argument_for_a_config_that_takes_none(refused, tmp_path) -> None:
    path = tmp_path / "plain.py"
    path.write_text("def get_config():\n    return {}\n")
    assert "takes no argument" in refused("train", f"--config={path}:dora", "--workdir=x")


def test_missing_and_wrong_directories(refused, config_path, tmp_path) -> None:
    assert "--config=FILE is missing" in refused("train", f"--workdir={tmp_path}")
    assert "--workdir=DIR is missing" in refused("train", f"--config={config_path}")
    file = tmp_path / "file"
    file.write_text("mine")
    for workdir in (file, file / "below"):
        line = refused("train", f"--config={config_path}", f"--workdir={workdir}")
        assert line == f"{file}: --workdir: is not a directory"
    assert file.read_text() == "mine"


def test_verbs(refused, cli) -> None:
    assert "unknown verb 'trian' (did you mean 'train'?)" in refused("trian")
    assert "--config=FILE is missing" in refused("plan")
    assert cli().code == 2
    assert cli("--version").out.startswith("jaxtune ")
