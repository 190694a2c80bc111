"""Every shipped config is a runnable document whose resolved form is on file."""

from __future__ import annotations

import ast
import pathlib
import re
import shlex

import pytest

from jaxtune.cli import arguments, config_file
from jaxtune.core.errors import RequestError

from . import write_goldens

NAMES = sorted(path.stem for path in write_goldens.CONFIGS.glob("*.py"))


def docstring(name: str) -> str:
    return ast.get_docstring(ast.parse((write_goldens.CONFIGS / f"{name}.py").read_text()))


def test_there_are_configs_and_a_golden_for_each() -> None:
    assert sorted(path.stem for path in write_goldens.GOLDENS.glob("*.json")) == NAMES
    assert {"pretrain_tiny", "sft_full", "sft_lora", "lora_sweep"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_config_resolves_to_its_golden(name: str) -> None:
    golden = (write_goldens.GOLDENS / f"{name}.json").read_text()
    assert write_goldens.text(name) == golden, "run python -m tests.recipes.write_goldens"


@pytest.mark.parametrize("name", NAMES)
def test_the_command_in_its_docstring_gives_all_that_it_needs(name: str) -> None:
    command = re.search(r"jaxtune (train|sweep)(.|\\\n)*?\n\n", docstring(name))[0]
    program, verb, *rest = shlex.split(command.replace("\\\n", " "))
    assert (program, verb) == ("jaxtune", "sweep" if name == "lora_sweep" else "train")
    split = arguments.split(rest)
    assert split.config == f"configs/{name}.py"
    assert [flag for flag in split.rest if not flag.startswith("--workdir=runs/")] == []
    loaded = config_file.load(str(write_goldens.CONFIGS / f"{name}.py"), split.overrides)
    loaded.resolve()


@pytest.mark.parametrize("name", NAMES)
def test_without_the_users_values_the_missing_key_is_named(name: str) -> None:
    for key, _ in write_goldens.given(name):
        others = [(k, v) for k, v in write_goldens.given(name) if k != key]
        loaded = config_file.load(str(write_goldens.CONFIGS / f"{name}.py"), others)
        with pytest.raises(RequestError, match="missing") as error:
            loaded.resolve()
        assert error.value.key == key
        assert pathlib.Path(str(error.value.where).partition(":")[0]).stem == name


def test_a_wrong_argument_is_refused_by_the_schema() -> None:
    spec = f"{write_goldens.CONFIGS / 'sft_lora.py'}:dorra"
    with pytest.raises(RequestError, match=r"peft\.variant: .*did you mean 'dora'"):
        config_file.load(spec, write_goldens.given("sft_lora")).resolve()
