"""The pages' commands, GKE through XPK, SkyPilot and SLURM."""

import contextlib
import os
import re
import shlex
import signal
import subprocess

import pytest
import yaml

from tests.tpu_scripts.fake_cloud import parse
from tests.tpu_scripts.world import ROOT, WHERE, executable

PAGES = [ROOT / "tpu_scripts" / "README.md", ROOT / "docs" / "gpu.md"]
TEXT = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
LINES = [line.strip() for line in TEXT.splitlines() if line.startswith("    ")]
SCRIPT_LINES = [line for line in LINES if line.startswith("tpu_scripts/")]
GCLOUD_LINES = [
    *(line for line in LINES if line.startswith("gcloud ")),
    *re.findall("`(gcloud .*?)`", TEXT),
]
AWKWARD = ["--config.data.train[0].source=jsonl:data/my file.jsonl", "--config.a=it's (a|b) $HOME"]


def test_there_are_lines_to_check():
    assert len(SCRIPT_LINES) > 8 and len(GCLOUD_LINES) > 8


@pytest.mark.parametrize("line", SCRIPT_LINES, ids=lambda line: line[:30])
def test_the_scripts_of_the_pages_run(world, line):
    script, *words = shlex.split(line)
    done = world.run(script.removeprefix("tpu_scripts/"), "--dry_run", *words)
    assert done.code == 0, done


@pytest.mark.parametrize("line", GCLOUD_LINES, ids=lambda line: line[:40])
def test_gcloud_knows_the_commands_of_the_pages(line):
    tool, *words = shlex.split(line)
    parse(tool, words)


def test_the_pages_name_every_script():
    table = TEXT.split("| script | does |")[1].split("\n\n")[0]
    for path in (ROOT / "tpu_scripts").iterdir():
        if path.suffix in ("", ".yaml", ".sbatch") and not path.name.startswith("."):
            assert path.name in ("worker", "env", "secrets") or f"`{path.name}`" in table, path.name


def test_gke_makes_a_cluster_and_deletes_it(world):
    world.settings(SPOT="true")
    for verb in ("create", "list", "delete"):
        assert world.run("gke", verb).code == 0
    assert world.run("gke", "stop", "--name=first").code == 0
    cluster = ["--cluster=jaxtune", *WHERE]
    size = ["--tpu-type=v5litepod-16", "--num-slices=1"]
    assert world.calls() == [
        ["xpk", "cluster", "create", *cluster, *size, "--spot"],
        ["xpk", "workload", "list", *cluster],
        ["xpk", "cluster", "delete", *cluster],
        ["xpk", "workload", "delete", *cluster, "--workload=first"],
    ]


def test_gke_runs_the_command_in_an_image_without_secrets(world):
    world.settings(SECRETS="secrets", DATA="gs://bucket/data")
    world.secrets("HF_TOKEN=hf_x\n")
    words = ["jaxtune", "train", *AWKWARD, "--workdir=gs://bucket/runs/first"]
    done = world.run("gke", "run", "--name=first", "--restarts=3", "--", *words)
    assert done.code == 0, done
    (call,) = world.calls("xpk")
    assert {"--workload=first", "--max-restarts=3", "--restart-on-exit-codes=1"} <= set(call)
    assert f"--env-file={world.laptop}/tpu_scripts/secrets" in call
    names = {
        p.relative_to(world.cloud / "image").as_posix() for p in (world.cloud / "image").rglob("*")
    }
    assert "configs/sft_lora.py" in names and "tpu_scripts/worker" in names
    assert not names & {"tpu_scripts/env", "tpu_scripts/secrets", "ignored.big"}
    # As a pod's shell reads it.
    tools = world.cloud / "pod"
    tools.mkdir()
    for name in ("pip", "python", "jaxtune"):
        executable(tools / name, f'#!/bin/sh\nprintf "%s\\n" "$@" >{tools}/{name}.arguments\n')
    shell = ["bash", "-c", call[-1].removeprefix("--command=")]
    subprocess.run(shell, check=True, env={"PATH": f"{tools}:/usr/bin:/bin"})
    installed = (tools / "pip.arguments").read_text().splitlines()
    assert installed == ["install", "--quiet", ".[tpu]", "gcsfs>=2024.2"]
    assert (tools / "python.arguments").read_text().endswith("\ngs://bucket/data/\n")
    assert (tools / "jaxtune.arguments").read_text().splitlines() == words[1:]


def test_gke_needs_a_verb(world):
    done = world.run("gke")
    assert done.code == 2 and "create, run, list, stop or delete" in done.err
    assert world.run("gke", "create", "delete").code == 2
    assert world.run("gke", "run", "--name=My Run", "--", "jaxtune", "x").code == 2


def test_skypilot_file():
    """Its fields were accepted by SkyPilot 0.14.1 (`sky.Task.from_yaml_config`)."""
    task = yaml.safe_load((ROOT / "tpu_scripts" / "skypilot.yaml").read_text())
    assert set(task) == {"name", "resources", "workdir", "envs", "secrets", "setup", "run"}
    assert task["resources"]["accelerators"] == "tpu-v5litepod-16"
    assert task["resources"]["accelerator_args"] == {"runtime_version": "v2-alpha-tpuv5-lite"}
    assert task["secrets"] == {"HF_TOKEN": None} and task["envs"]["WORKDIR"] is None
    for step in ("setup", "run"):
        subprocess.run(["bash", "-n", "-c", task[step]], check=True)


def test_skypilot_file_starts_training(tmp_path):
    task = yaml.safe_load((ROOT / "tpu_scripts" / "skypilot.yaml").read_text())
    programs = tmp_path / "jaxtune-venv" / "bin"
    programs.mkdir(parents=True)
    executable(programs / "jaxtune", '#!/bin/sh\nprintf "%s\\n" "$@"\n')
    environment = {**task["envs"], "WORKDIR": "gs://b/my run", "HOME": str(tmp_path)}
    done = subprocess.run(
        ["bash", "-c", task["run"]],
        env={**environment, "PATH": "/usr/bin:/bin"},
        check=True,
        capture_output=True,
        text=True,
    )
    assert done.stdout.splitlines() == [
        "train",
        "--config=configs/sft_lora.py",
        "--config.model.path=hub:Qwen/Qwen3-8B",
        "--config.data.train[0].source=jsonl:data/train.jsonl",
        "--workdir=gs://b/my run",
    ]


@contextlib.contextmanager
def slurm(tmp_path, srun):
    """Starts the batch script as SLURM does, with a `srun` of our own."""
    for directory in ("bin", "home/.jaxtune", "submitted"):
        (tmp_path / directory).mkdir(parents=True)
    executable(tmp_path / "bin" / "srun", f"#!/bin/bash\n{srun}\n")
    executable(tmp_path / "bin" / "scontrol", f'#!/bin/sh\necho "$*" >{tmp_path}/scontrol\n')
    (tmp_path / "home" / ".jaxtune" / "secrets").write_text("HF_TOKEN=hf_x\n")
    environment = {
        "PATH": f"{tmp_path}/bin:/usr/bin:/bin",
        "HOME": f"{tmp_path}/home",
        "SLURM_SUBMIT_DIR": f"{tmp_path}/submitted",
        "SLURM_JOB_ID": "7",
    }
    words = ["bash", ROOT / "tpu_scripts" / "slurm.sbatch", *AWKWARD, "--workdir=runs/first"]
    process = subprocess.Popen(
        words, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def test_slurm_script_runs_the_command_on_all_tasks(tmp_path):
    with slurm(tmp_path, 'printf "%s\\n" "$@" "$HF_TOKEN" "$PWD"; exit 3') as process:
        out, _ = process.communicate(timeout=30)
    assert process.returncode == 3 and not (tmp_path / "scontrol").exists()
    assert out.splitlines() == [
        *["--kill-on-bad-exit=0", ".venv/bin/jaxtune", "train", *AWKWARD, "--workdir=runs/first"],
        *["hf_x", f"{tmp_path}/submitted"],
    ]


def test_slurm_script_lets_the_run_save_and_asks_for_more_time(tmp_path):
    step = "trap 'echo saved; exit 1' TERM; echo begun; while :; do sleep 0.05; done"
    with slurm(tmp_path, step) as process:
        assert process.stdout.readline() == "begun\n"
        process.terminate()
        out, _ = process.communicate(timeout=30)
    assert (out, process.returncode) == ("saved\n", 1)
    assert (tmp_path / "scontrol").read_text() == "requeue 7\n"


def test_slurm_script_has_help():
    text = (ROOT / "tpu_scripts" / "slurm.sbatch").read_text()
    directives = re.findall(r"^#SBATCH (--[a-z-]+)", text, re.MULTILINE)
    # SLURM stops reading directives at the first command.
    assert text.index("#SBATCH --output") < text.index("set -euo pipefail")
    assert {"--nodes", "--ntasks-per-node", "--gpus-per-node", "--signal", "--requeue"} <= set(
        directives
    )
    words = ["bash", ROOT / "tpu_scripts" / "slurm.sbatch", "--help"]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert "sbatch tpu_scripts/slurm.sbatch" in done.stdout and "#SBATCH" not in done.stdout
