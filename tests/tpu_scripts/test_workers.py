"""setup, run, logs, stop: what happens in the workers' shells."""

import subprocess
import time
from pathlib import Path

import pytest

from tests.tpu_scripts.world import WHERE, until

pytestmark = pytest.mark.slow
SSH = ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "jaxtune", *WHERE]
SCP = ["gcloud", "compute", "tpus", "tpu-vm", "scp"]
# Whatever a shell could take for something of its own.
AWKWARD = [
    "--config.data.train[0].source=jsonl:data/my file.jsonl",
    "--config.peft.targets=(q|v)_proj$",
    "--config.a=it's \"quoted\" `id` $HOME ${HOME} $(id) \\ \\' ! # ~ * ? {a,b} ; & | < >",
    "--config.b=",
    "--config.c=ünï\tcode",
    "--config.d=two\nlines",
    "~",
    "[0]",
]
TOKEN = "hf_aVerySecretValue123"
KEY = "0123456789abcdefWANDB"


def test_setup_brings_sources_packages_and_data(world):
    world.settings(DATA="gs://bucket/data", EXTRAS="tpu,wandb")
    data = world.cloud / "bucket" / "bucket" / "data"
    data.mkdir(parents=True)
    (data / "train.jsonl").write_text("{}\n")
    (world.laptop / "new file.txt").write_text("not committed")
    world.secrets("HF_TOKEN=x\n")
    world.run("create")
    world.forget()
    done = world.run("setup")
    assert done.code == 0, done
    for number in (0, 1):
        tree = world.worker(number) / "jaxtune"
        assert (tree / "configs" / "sft_lora.py").read_text() == "# a config\n"
        assert (tree / "new file.txt").read_text() == "not committed"
        assert (tree / "data" / "train.jsonl").read_text() == "{}\n"
        assert not (tree / "ignored.big").exists() and not (tree / ".git").exists()
        assert not (tree / "tpu_scripts" / "secrets").exists()
        installed = (world.worker(number) / "installed").read_text()
        assert "uv venv --quiet --python=3.12" in installed
        assert "--editable" in installed and "/jaxtune[tpu,wandb]" in installed
    calls = [call for call in world.calls() if "storage" not in call]
    assert calls[0] == [*SSH, "--worker=0", "--quiet", "--command=true"]
    assert calls[1][:5] == SCP and calls[1][6:] == [
        *["jaxtune:jaxtune.tar.gz", *WHERE, "--worker=all", "--quiet"]
    ]
    assert all("--worker=all" in call for call in calls[1:])


def test_setup_again_removes_old_sources_and_keeps_the_environment(world):
    world.run("create")
    world.run("setup")
    (world.laptop / "configs" / "sft_lora.py").unlink()
    assert world.run("setup").code == 0
    home = world.worker()
    assert not (home / "jaxtune" / "configs").exists()
    assert (home / "installed").read_text().count("uv venv") == 1


def test_setup_waits_until_the_slice_can_be_reached(world):
    world.run("create")
    world.plan(ssh=["connection refused", "connection refused"])
    done = world.run("setup", "--wait=0")
    assert done.code == 0 and done.err.count("connection refused") == 2
    world.plan(ssh=["connection refused"] * 9)
    done = world.run("setup", "--wait=0", "--attempts=3")
    assert done.code == 1 and "cannot be reached" in done.err


def test_setup_leaves_a_run_alone(world):
    world.ready()
    world.behave("train")
    assert world.run("run", "--no_follow", "--", "jaxtune", "x").code == 0
    done = world.run("setup")
    assert done.code == 1 and "a run is going on" in done.err
    assert (world.worker() / "jaxtune" / "tpu_scripts" / "worker").exists()


def test_arguments_arrive_as_they_were_given(world):
    world.ready()
    workdir = "--workdir=gs://bucket/runs/a b"
    done = world.run("run", "--", "jaxtune", "train", *AWKWARD, workdir)
    assert done.code == 0, done
    for number in (0, 1):
        home = world.worker(number)
        assert world.arguments(number) == "\n".join(["train", *AWKWARD, workdir, ""])
        assert (home / "directory").read_text() == f"{home}/jaxtune\n"
    assert "training on t1v-n-abc-w-0" in done.out


def test_a_dry_run_can_be_pasted_into_a_shell(world):
    """The printed line, evaluated by a shell, makes the very call that is made without it."""
    world.ready()
    command = ("--no_follow", "--", "jaxtune", "x", *AWKWARD)
    printed = world.run("run", "--dry_run", *command).out
    assert world.run("run", *command).code == 0
    (made,) = world.calls()
    world.forget()
    path = f"{world.laptop / 'bin'}:/usr/bin:/bin"
    subprocess.run(["sh", "-c", printed], env={"PATH": path}, check=False, capture_output=True)
    (pasted,) = world.calls()
    token = made[-1].split(" start ")[1].split()[0]
    assert pasted[:-1] == made[:-1]
    assert pasted[-1].replace(" start TIME ", f" start {token} ") == made[-1]


def test_run_follows_the_log_and_exits_as_the_run(world):
    world.ready()
    world.behave(7)
    done = world.run("run", "--", "jaxtune", "x")
    assert done.code == 7
    assert done.out.startswith("training on t1v-n-abc-w-0\n")
    assert "worker 1: exit code 7" in done.err
    assert "[1] training on t1v-n-abc-w-1" in done.out
    start, follow, result = world.calls()
    assert start[:-1] == [*SSH, "--worker=all", "--quiet"]
    assert follow == [
        *SSH,
        "--worker=0",
        "--quiet",
        "--command=jaxtune/tpu_scripts/worker log all follow",
    ]
    assert result == [
        *SSH,
        "--worker=all",
        "--quiet",
        "--command=jaxtune/tpu_scripts/worker result",
    ]


def test_255_is_not_taken_for_a_broken_connection(world):
    world.ready()
    world.behave(255)
    assert world.run("run", "--", "jaxtune", "x").code == 1


def test_a_start_that_is_repeated_starts_once(world):
    """gcloud repeats a command whose connection broke, with the same token."""
    world.ready(workers=1)
    world.behave("train")
    assert world.run("run", "--no_follow", "--", "jaxtune", "x").code == 0
    (start,) = world.calls("--worker=all")
    world.arguments()
    gcloud = world.laptop / "bin" / "gcloud"
    assert subprocess.run([gcloud, *start[1:]], check=False).returncode == 0
    done = world.run("run", "--no_follow", "--", "jaxtune", "y")
    assert done.code == 1 and "a run is going on" in done.err
    assert (world.worker() / "arguments").read_text() == "x\n"
    assert len(list((world.worker() / ".jaxtune" / "logs").iterdir())) == 1


def test_train_needs_a_workdir_that_outlives_the_slice(world):
    for words, message in [
        ((), "needs --workdir=gs://"),
        (("--workdir=runs/first",), "--workdir=runs/first is lost with the slice"),
        (("--workdir", "gs://bucket/r"), "in one word"),
    ]:
        for script in ("run", "watch", "gke"):
            first = ("run",) if script == "gke" else ()
            done = world.run(script, *first, "--", "jaxtune", "train", "--config=c.py", *words)
            assert done.code == 2 and message in done.err and done.out == ""
    assert world.run("run", "--dry_run", "--", "jaxtune", "train", "--dry_run").code == 0
    assert world.run("run").code == 2
    assert world.calls() == []


def test_run_says_that_setup_is_missing(world):
    world.run("create")
    done = world.run("run", "--", "jaxtune", "x")
    assert done.code != 0 and "jaxtune/tpu_scripts/worker" in done.err


def test_logs_of_one_worker_and_of_all(world):
    world.ready()
    world.behave(3)
    world.run("run", "--no_follow", "--", "jaxtune", "x")
    done = world.run("logs")
    assert (done.code, done.out) == (3, "training on t1v-n-abc-w-0\n")
    done = world.run("logs", "--worker=1", "--no_follow", "--lines=5")
    assert (done.code, done.out) == (0, "training on t1v-n-abc-w-1\n")
    done = world.run("logs", "--worker=all", "--no_follow")
    lines = sorted(done.out.splitlines())
    assert lines == [f"[{n}] training on t1v-n-abc-w-{n}" for n in (0, 1)]
    assert world.run("logs", "--worker=first").code == 2
    assert world.run("logs", "--lines=few").code == 2


def test_logs_follow_until_the_end(world):
    world.ready(workers=1)
    world.behave("train")
    world.run("run", "--no_follow", "--", "jaxtune", "x")
    world.arguments()
    process = world.start("logs", "--lines=0")
    until(lambda: world.calls("--worker=0"))
    assert process.process.poll() is None
    world.behave(0)
    assert process.end().code == 0


def test_stop_lets_the_run_save(world):
    world.ready()
    world.behave("train")
    world.run("run", "--no_follow", "--", "jaxtune", "x")
    for number in (0, 1):
        world.arguments(number)
    done = world.run("stop")
    assert done.code == 0 and "billed until tpu_scripts/delete" in done.err
    for number in (0, 1):
        (log,) = (world.worker(number) / ".jaxtune" / "logs").iterdir()
        assert log.read_text().endswith("saved\n")
    assert world.run("run", "--no_follow", "--", "jaxtune", "y").code == 0


def test_after_a_reboot_the_number_of_the_process_says_nothing(world):
    world.ready(workers=1)
    world.behave("train")
    world.run("run", "--no_follow", "--", "jaxtune", "x")
    world.arguments()
    (world.worker() / ".jaxtune" / "run" / "boot").write_text("an earlier one\n")
    done = world.run("logs")
    assert done.code == 1 and "not there any more" in done.err
    assert world.run("stop").code == 0
    (log,) = (world.worker() / ".jaxtune" / "logs").iterdir()
    assert "saved" not in log.read_text()


def test_stop_kills_what_does_not_end(world):
    world.ready(workers=1)
    world.behave("deaf")
    world.run("run", "--no_follow", "--", "jaxtune", "x")
    world.arguments()
    time.sleep(0.2)
    child = int((world.worker() / ".jaxtune" / "run" / "child").read_text())
    done = world.run("stop", "--grace=0")
    assert done.code == 0 and "did not end within 0 s: killed" in done.err
    until(lambda: not Path(f"/proc/{child}/exe").exists())


def test_stop_frees_a_stuck_tpu(world):
    """A process that is none of ours holds the chip, and ignores SIGTERM."""
    world.ready(workers=1)
    home = world.worker()
    stuck = subprocess.Popen(
        ["bash", "-c", "trap '' TERM; echo; while :; do sleep 0.1; done"], stdout=-1
    )
    stuck.stdout.readline()
    (home / "holders").write_text(f"{stuck.pid}\n")
    (home / "libtpu_lockfile").write_text("")
    done = world.run("stop")
    assert done.code == 0
    assert stuck.wait(timeout=30) == -9
    assert f"processes that hold the TPU are sent SIGKILL: {stuck.pid}" in done.err
    assert not (home / "libtpu_lockfile").exists()


def test_secrets_reach_the_run_and_nothing_else(world):
    world.settings(SECRETS="secrets")
    world.secrets(f"# mine\nHF_TOKEN={TOKEN}\nWANDB_API_KEY={KEY}\n")
    world.behave("train")
    printed = []
    for script, *words in [
        ("create",),
        ("setup",),
        ("run", "--no_follow", "--", "jaxtune", "x"),
        ("logs", "--no_follow", "--worker=all"),
        ("stop",),
        ("setup", "--dry_run"),
        ("run", "--dry_run", "--", "jaxtune", "x"),
        ("watch", "--dry_run", "--", "jaxtune", "x"),
        ("gke", "run", "--", "jaxtune", "x"),
        ("gke", "run", "--dry_run", "--", "jaxtune", "x"),
    ]:
        done = world.run(script, *words)
        assert done.code == 0, done
        printed.append(done.out + done.err)
        if script == "run" and "--no_follow" in words:
            world.arguments(0)
            world.arguments(1)
    files = [world.cloud / "calls.jsonl", *world.cloud.glob("w*/.jaxtune/logs/*")]
    files += [p for p in world.cloud.glob("w*/jaxtune/**/*") if p.is_file()]
    files += [p for p in (world.cloud / "image").rglob("*") if p.is_file()]
    assert len(files) > 40
    for text in [*printed, *(path.read_text(errors="replace") for path in files)]:
        assert TOKEN not in text and KEY not in text
    for number in (0, 1):
        home = world.worker(number)
        environment = (home / "environment").read_text().splitlines()
        assert f"HF_TOKEN={TOKEN}" in environment and f"WANDB_API_KEY={KEY}" in environment
        secrets = home / ".jaxtune" / "secrets"
        assert secrets.stat().st_mode & 0o777 == 0o600
        assert secrets.parent.stat().st_mode & 0o777 == 0o700
    (send,) = [c for c in world.calls() if "jaxtune:.jaxtune/secrets" in c]
    assert send[5] == str(world.laptop / "tpu_scripts" / "secrets")


@pytest.mark.parametrize(
    ("text", "mode", "message"),
    [
        (f"HF_TOKEN={TOKEN}\n", 0o644, "can be read by others (mode 644)"),
        (f"HF_TOKEN={TOKEN}\n", 0o640, "chmod 600"),
        (f"HF_TOKEN={TOKEN}\nX='{KEY}'\n", 0o600, "secrets:2: expected NAME=VALUE"),
        (f"HF_TOKEN=$(echo {TOKEN})\n", 0o600, "secrets:1:"),
        (TOKEN, 0o600, "secrets:1:"),
    ],
)
def test_secrets_that_others_can_read_or_that_are_code_are_refused(world, text, mode, message):
    world.settings(SECRETS="secrets")
    world.secrets(text, mode)
    done = world.run("setup")
    assert done.code == 2 and message in done.err and len(done.err.splitlines()) == 1
    assert TOKEN not in done.err and KEY not in done.err
    assert world.calls() == []


def test_secrets_that_are_gone_from_the_env_file_are_removed(world):
    world.settings(SECRETS="secrets")
    world.secrets(f"HF_TOKEN={TOKEN}\n")
    world.run("create")
    world.run("setup")
    assert (world.worker() / ".jaxtune" / "secrets").exists()
    world.settings()
    assert world.run("setup").code == 0
    assert not (world.worker() / ".jaxtune" / "secrets").exists()
    world.settings(SECRETS="none")
    assert "there is no" in world.run("setup").err


def test_the_key_of_gcloud_is_put_into_the_agent(world):
    key = world.laptop / "home" / ".ssh" / "google_compute_engine"
    key.write_text("")
    world.ready()
    world.run("stop")
    assert f"ssh-add -q {key}" in (world.cloud / "keys").read_text()


def test_with_the_real_tmux(world):
    tool = "/usr/bin/tmux"
    if subprocess.run(["test", "-x", tool]).returncode:
        pytest.skip(f"needs {tool}")
    (world.cloud / "worker_bin" / "tmux").unlink()
    world.ready(workers=1)
    try:
        world.behave("train")
        done = world.run("run", "--no_follow", "--", "jaxtune", "x", *AWKWARD)
        assert done.code == 0, done
        assert world.arguments() == "\n".join(["x", *AWKWARD, ""])
        assert world.run("run", "--no_follow", "--", "jaxtune", "x").code == 1
        assert world.run("stop").code == 0
        assert world.run("logs", "--no_follow").out.endswith("saved\n")
    finally:
        home = {"TMUX_TMPDIR": str(world.worker())}
        subprocess.run([tool, "kill-server"], env=home, capture_output=True, check=False)
