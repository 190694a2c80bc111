"""A cloud in a directory: stands for `gcloud` and `xpk` on the tests' PATH.

    python fake_cloud.py DIR gcloud|xpk ARGUMENT ...

Every call is appended to DIR/calls.jsonl, and refused if flags.json does not know its flags. DIR
holds `node` and `queue` (their states; absent: there is none), `plan.json` (what is to happen),
`bucket/` (gs://), and one home directory for each worker, `w0`, `w1`, …: a command that is sent
there is evaluated by a real shell in it.
"""

import contextlib
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

FLAGS = json.loads(Path(__file__).with_name("flags.json").read_text(encoding="utf-8"))
# What is done once for a project, and changes nothing that the scripts see.
RECORDED = ("auth login", "projects create", "billing projects link", "services enable")
PROJECT_NUMBER = 123456789012


def known_command(tool, words):
    """Returns the longest known command that the words begin with, and its flags."""
    for end in range(len(words), 0, -1):
        command = " ".join(words[:end])
        if command in FLAGS[tool]:
            wide = FLAGS["wide"] if tool == "gcloud" else ""
            return command, set(f"{FLAGS[tool][command]} {wide}".split())
    sys.exit(f"ERROR: ({tool}) Invalid choice: {words[:4]}")


def parse(tool, words):
    """Returns the command, its flags with their values, and its other words."""
    command, known = known_command(tool, words)
    given, rest = {}, []
    for word in words[len(command.split()) :]:
        flag, _, value = word.partition("=")
        if not word.startswith("--"):
            rest.append(word)
        elif flag not in known:
            sys.exit(f"ERROR: ({tool}) unrecognized arguments: {flag}")
        else:
            given[flag] = value
    return command, given, rest


@contextlib.contextmanager
def plan(root):
    """What is to happen, to be read and changed by one process at a time."""
    with (root / "plan.json").open("r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        content = json.load(file)
        yield content
        file.seek(0)
        file.truncate()
        json.dump(content, file)


class Cloud:
    def __init__(self, root):
        self.root = root

    def next(self, key, default=None):
        """Takes the next of the things that are planned for `key`."""
        with plan(self.root) as content:
            values = content.get(key)
            return values.pop(0) if values else default

    def planned(self, key, default):
        with plan(self.root) as content:
            return content.get(key, default)

    def get(self, kind):
        path = self.root / kind
        return path.read_text() if path.exists() else None

    def put(self, kind, state):
        path = self.root / kind
        path.unlink(missing_ok=True) if state is None else path.write_text(state)

    def workers(self):
        return sorted(self.root.glob("w[0-9]"))

    def boot(self):
        """Makes the node, with empty workers."""
        self.put("node", "READY")
        for worker in range(self.planned("workers", 2)):
            (self.root / f"w{worker}").mkdir()

    def destroy(self):
        """Ends all processes of the workers and removes their disks."""
        for worker in self.workers():
            for group in (worker / ".tmux").glob("*"):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(int(group.read_text()), signal.SIGKILL)
            # A process that is ending may still write a file into it.
            while worker.exists():
                shutil.rmtree(worker, ignore_errors=True)

    def delete(self, kind):
        self.put(kind, None)
        if kind == "node":
            self.destroy()

    def create(self, kind):
        """Fails with the planned message, or makes what was asked for."""
        problem = self.next("create")
        if problem:
            if problem.startswith("half: "):
                self.put("node", "CREATING")
            sys.exit(f"ERROR: (gcloud.create) {problem.removeprefix('half: ')}")
        if kind == "node":
            self.boot()
        else:
            self.put("queue", "WAITING_FOR_RESOURCES")

    def describe(self, kind, field):
        state = self.next(f"{kind}_states")
        if state == "broken":
            sys.exit("ERROR: (gcloud.describe) UNAVAILABLE: connection reset")
        if state is not None:
            self.put(kind, state)
            if kind == "queue" and state == "ACTIVE":
                self.boot()
            if (kind, state) in {("node", "PREEMPTED"), ("queue", "SUSPENDED")}:
                self.put("node", "PREEMPTED")
                self.destroy()
                self.put("behaviour", self.planned("after_preemption", "train"))
        if self.get(kind) is None:
            sys.exit(f"ERROR: (gcloud.describe) NOT_FOUND: Resource '{kind}' was not found")
        print(self.next("queue_errors", "") if "error" in field else self.get(kind))

    def chosen(self, flags):
        if self.get("node") != "READY":
            sys.exit("ERROR: (gcloud.ssh) the TPU is in an unusable state")
        problem = self.next("ssh")
        if problem:
            sys.exit(f"ERROR: (gcloud.ssh) {problem}")
        which = flags.get("--worker", "0")
        return self.workers() if which == "all" else [self.root / f"w{which}"]

    def ssh(self, flags):
        command = flags["--command"]
        running = [
            subprocess.Popen(["bash", "-c", command], cwd=home, env=worker_environment(home))
            for home in self.chosen(flags)
        ]
        sys.exit(next((code for code in [p.wait() for p in running] if code), 0))

    def scp(self, flags, words):
        source, target = words
        for home in self.chosen(flags):
            place = home / target.partition(":")[2]
            place.write_bytes(Path(source).read_bytes())
            place.chmod(Path(source).stat().st_mode)

    def storage(self, command, words):
        here = self.root / "bucket" / words[0].removeprefix("gs://")
        if command == "storage buckets create":
            here.mkdir(parents=True)
        elif command.startswith("storage buckets "):
            if not here.is_dir():
                sys.exit(f"ERROR: (gcloud) the bucket {words[0]} does not exist")
        elif command == "storage cp" and words[1].startswith("gs://"):
            there = self.root / "bucket" / words[1].removeprefix("gs://")
            there.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(words[0], there)
        elif command == "storage cat":
            if not here.is_file():
                sys.exit("ERROR: (gcloud.storage.cat) The following URLs matched no objects")
            print(here.read_text(), end="")
        else:
            shutil.copytree(here, words[1], dirs_exist_ok=True)


def worker_environment(home):
    """The little that a shell on a worker has."""
    path = f"{home.parent / 'worker_bin'}:/usr/bin:/bin"
    name = f"t1v-n-abc-w-{home.name[1:]}"
    return {
        "HOME": str(home),
        "PATH": path,
        "HOSTNAME": name,
        "TPU_LOCK_FILE": str(home / "libtpu_lockfile"),
        "TPU_DEVICE_FILES": str(home / "accel0"),
        "TMUX_TMPDIR": str(home),
    }


def main():
    root, tool, words = Path(sys.argv[1]), sys.argv[2], sys.argv[3:]
    with (root / "calls.jsonl").open("a") as file:
        file.write(json.dumps([tool, *words]) + "\n")
    command, flags, rest = parse(tool, words)
    cloud = Cloud(root)
    kind = "queue" if "queued-resources" in command else "node"
    verb = command.split()[-1]
    if tool == "xpk":
        if verb == "create" and "--script-dir" in flags:
            shutil.copytree(flags["--script-dir"], root / "image")
        return
    if command in RECORDED:
        return
    if command == "projects describe":
        print(PROJECT_NUMBER)
    elif command.startswith("storage "):
        cloud.storage(command, rest)
    elif verb in ("create", "delete"):
        getattr(cloud, verb)(kind)
        if command.endswith("queued-resources delete") and "--force" in flags:
            cloud.delete("node")
    elif verb == "describe":
        cloud.describe(kind, flags["--format"])
    elif verb == "list":
        print("jaxtune\n" if cloud.get(kind) else "", end="")
    elif verb == "ssh":
        cloud.ssh(flags)
    elif verb == "scp":
        cloud.scp(flags, rest)
    else:
        sys.exit(f"the fake cloud cannot {command}")


if __name__ == "__main__":
    main()
