"""A laptop and a cloud for the scripts: a copy of them in a repository, and fakes on the PATH."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from tests.tpu_scripts.fake_cloud import Cloud, plan

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ("create", "queue", "setup", "run", "logs", "stop", "delete", "watch", "gke")
SETTINGS = {
    "PROJECT": "my-project",
    "ZONE": "us-west4-a",
    "TPU_NAME": "jaxtune",
    "TPU_TYPE": "v5litepod-16",
    "TPU_VERSION": "v2-alpha-tpuv5-lite",
}
WHERE = ["--project=my-project", "--zone=us-west4-a"]
# One line an argument; a run is told by $FAKE/behaviour what to do.
JAXTUNE = """#!/bin/bash
[ "$1" != --help ] || exit 0
printf '%s\\n' "$@" >"$HOME/arguments"
env >"$HOME/environment"
pwd >"$HOME/directory"
echo "training on $HOSTNAME"
trap 'echo saved; exit 1' TERM
for _ in $(seq 600); do
    case $(cat "FAKE/behaviour") in
        train) sleep 0.05 ;;
        deaf) trap '' TERM; sleep 0.05 ;;
        *) exit "$(cat "FAKE/behaviour")" ;;
    esac
done
"""
UV = """#!/bin/bash
echo "uv $*" >>"$HOME/installed"
for word in "$@"; do last=$word; done
case $1 in
    venv) mkdir -p "$last/bin" && ln -s FAKE/worker_bin/stub "$last/bin/python" ;;
    pip) cp FAKE/worker_bin/jaxtune_stub "$HOME/.jaxtune/venv/bin/jaxtune" ;;
esac
"""
TMUX = """#!/bin/bash
mkdir -p "$HOME/.tmux"
alive() { kill -0 "-$(cat "$HOME/.tmux/$1" 2>/dev/null)" 2>/dev/null; }
case $1 in
    has-session) alive "${3#=}" ;;
    kill-session) alive "${3#=}" && kill -HUP "-$(cat "$HOME/.tmux/${3#=}")" ;;
    new-session)
        setsid sh -c "$5" </dev/null >/dev/null 2>&1 &
        echo $! >"$HOME/.tmux/$4"
        ;;
esac
"""


@dataclass(frozen=True)
class Done:
    """What a script did: its exit code and what it printed."""

    code: int
    out: str
    err: str


@dataclass(frozen=True)
class Started:
    """A script that is running, and the files that it prints to."""

    process: subprocess.Popen
    out: Path
    err: Path

    def wait_for(self, text):
        """Waits until the script has said something."""
        until(lambda: text in self.err.read_text())

    def end(self) -> Done:
        """Waits for the end of the script."""
        try:
            code = self.process.wait(timeout=120)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise AssertionError(self.err.read_text()) from None
        return Done(code, self.out.read_text(), self.err.read_text())


def until(condition):
    """Waits for what another process does."""
    for _ in range(1200):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("it did not happen")


@dataclass(frozen=True)
class World:
    """Attributes: laptop: the repository and the home; cloud: the fake cloud's directory."""

    laptop: Path
    cloud: Path

    def start(self, script, *arguments):
        """Starts a script and returns its process."""
        environment = {
            "PATH": f"{self.laptop / 'bin'}:/usr/bin:/bin",
            "HOME": str(self.laptop / "home"),
            "TMPDIR": str(self.laptop / "tmp"),
        }
        out, err = (tempfile.mkstemp(dir=self.cloud, prefix=name) for name in ("out", "err"))
        process = subprocess.Popen(
            [str(self.laptop / "tpu_scripts" / script), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=out[0],
            stderr=err[0],
            env=environment,
            cwd=self.laptop / "home",
        )
        os.close(out[0])
        os.close(err[0])
        return Started(process, Path(out[1]), Path(err[1]))

    def run(self, script, *arguments):
        """Runs a script; returns what it did."""
        return self.start(script, *arguments).end()

    def settings(self, **changes):
        """Writes the env file; a setting of None is left out."""
        lines = [f"{k}={v}" for k, v in {**SETTINGS, **changes}.items() if v is not None]
        (self.laptop / "tpu_scripts" / "env").write_text("\n".join(["# comment", "", *lines, ""]))

    def secrets(self, text, mode=0o600):
        path = self.laptop / "tpu_scripts" / "secrets"
        path.write_text(text)
        path.chmod(mode)

    def plan(self, **changes):
        with plan(self.cloud) as content:
            content.update(changes)

    def behave(self, what):
        """Tells the training processes to `train`, be `deaf` to SIGTERM, or exit with a code."""
        new = self.cloud / "behaviour.new"
        new.write_text(str(what))
        new.replace(self.cloud / "behaviour")

    def calls(self, *words):
        """Returns the recorded calls that contain all the words."""
        path = self.cloud / "calls.jsonl"
        calls = [json.loads(line) for line in path.read_text().splitlines()]
        return [call for call in calls if set(words) <= set(call)]

    def forget(self):
        (self.cloud / "calls.jsonl").write_text("")

    def arguments(self, number=0):
        """What the training process of a worker was given, once it is there."""
        path = self.worker(number) / "arguments"
        until(path.exists)
        return path.read_text()

    def worker(self, number=0):
        return self.cloud / f"w{number}"

    def ready(self, workers=2):
        """Makes a slice that `setup` has been on, as far as the other scripts need it."""
        self.plan(workers=workers)
        Cloud(self.cloud).boot()
        for number in range(workers):
            self.equip(number)

    def equip(self, number):
        home, tools = self.worker(number), self.cloud / "worker_bin"
        scripts, programs = home / "jaxtune" / "tpu_scripts", home / ".jaxtune" / "venv" / "bin"
        scripts.mkdir(parents=True)
        programs.mkdir(parents=True)
        shutil.copy(self.laptop / "tpu_scripts" / "worker", scripts)
        shutil.copy(tools / "stub", programs / "python")
        shutil.copy(tools / "jaxtune_stub", programs / "jaxtune")


def executable(path, text):
    path.write_text(text)
    path.chmod(0o755)


def build(root: Path) -> World:
    """Makes a world in an empty directory."""
    world = World(root / "laptop", root / "cloud")
    for directory in ("bin", "home/.ssh", "tmp"):
        (world.laptop / directory).mkdir(parents=True)
    yours = shutil.ignore_patterns("env", "secrets*")
    shutil.copytree(ROOT / "tpu_scripts", world.laptop / "tpu_scripts", ignore=yours)
    (world.laptop / "configs").mkdir()
    (world.laptop / "configs" / "sft_lora.py").write_text("# a config\n")
    (world.laptop / ".gitignore").write_text("/home/\n/tmp/\n/bin/\n*.big\n")
    (world.laptop / "ignored.big").write_text("not for the workers")
    environment = {**os.environ, "GIT_CONFIG_GLOBAL": "/dev/null"}
    subprocess.run(["git", "init", "-q", world.laptop], check=True, env=environment)

    world.cloud.mkdir()
    (world.cloud / "plan.json").write_text("{}")
    world.forget()
    world.behave(0)
    fake = Path(__file__).with_name("fake_cloud.py")
    for tool in ("gcloud", "xpk"):
        line = f'exec {sys.executable} -SE {fake} {world.cloud} {tool} "$@"\n'
        executable(world.laptop / "bin" / tool, f"#!/bin/sh\n{line}")
    note = f'echo "ssh-add $*" >>{world.cloud}/keys\n[ "$1" != -l ]\n'
    executable(world.laptop / "bin" / "ssh-add", f"#!/bin/sh\n{note}")

    tools = world.cloud / "worker_bin"
    tools.mkdir()
    for name, text in {
        "uv": UV,
        "tmux": TMUX,
        "jaxtune_stub": JAXTUNE,
        "stub": "#!/bin/sh\n",
        "sudo": '#!/bin/sh\nexec "$@"\n',
        "lsof": '#!/bin/sh\ncat "$HOME/holders" 2>/dev/null\n',
        "gcloud": (world.laptop / "bin" / "gcloud").read_text(),
    }.items():
        executable(tools / name, text.replace("FAKE", str(world.cloud)))
    world.settings()
    return world


def demolish(world: World):
    """Ends what still runs on the workers."""
    Cloud(world.cloud).destroy()
