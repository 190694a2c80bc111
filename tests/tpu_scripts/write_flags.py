"""Writes flags.json: the flags that gcloud and xpk take, from their own --help.

    python -m tests.tpu_scripts.write_flags

Needs the Google Cloud SDK with its alpha commands, and xpk. The fakes on the tests' PATH refuse
every command and flag that is not in this file.
"""

import json
import re
import subprocess
from pathlib import Path

FLAGS = Path(__file__).with_name("flags.json")
GCLOUD = [
    *(f"compute tpus tpu-vm {verb}" for verb in ("create", "delete", "describe", "list")),
    *(f"compute tpus queued-resources {verb}" for verb in ("create", "delete", "describe", "list")),
    "compute tpus tpu-vm ssh",
    "compute tpus tpu-vm scp",
    "compute tpus accelerator-types list",
    "alpha compute tpus tpu-vm ssh",
    "alpha compute tpus tpu-vm scp",
    "alpha compute tpus queued-resources create",
    *(f"storage {verb}" for verb in ("cat", "cp", "ls", "rm", "rsync")),
    "storage buckets create",
    "storage buckets delete",
    "storage buckets add-iam-policy-binding",
    "iam service-accounts create",
    "projects create",
    "projects describe",
    "billing projects link",
    "billing budgets create",
    "services enable",
    "auth login",
    "config set",
]
XPK = [
    *(f"cluster {verb}" for verb in ("create", "delete")),
    *(f"workload {verb}" for verb in ("create", "delete", "list")),
]


def help_of(*words: str) -> str:
    done = subprocess.run([*words, "--help"], check=True, capture_output=True, text=True)
    return re.sub(r"\x1b\[[0-9;]*m|.\x08", "", done.stdout)


def gcloud(command: str) -> str:
    """The flags of the command alone; those of all commands stand once, as `wide`."""
    text = help_of("gcloud", *command.split())
    return flags_in(text.split("SYNOPSIS")[1].split("\nDESCRIPTION")[0])


def wide() -> str:
    text = help_of("gcloud", *GCLOUD[0].split())
    return flags_in(text.split("GCLOUD WIDE FLAGS")[-1].split("\nNOTES")[0])


def xpk(command: str) -> str:
    return flags_in(help_of("xpk", *command.split()))


def flags_in(text: str) -> str:
    names = re.findall(r"--(?:\[no-\])?([a-z][a-z-]*)", text)
    return " ".join(sorted({f"--{name}" for name in names}))


def version(*words: str) -> str:
    done = subprocess.run(words, check=True, capture_output=True, text=True)
    return re.search(r"\d+\.\d+\.\d+", done.stdout)[0]


if __name__ == "__main__":
    table = {
        "versions": {
            "gcloud": version("gcloud", "--version"),
            "xpk": version("xpk", "version"),
        },
        "wide": wide(),
        "gcloud": {command: gcloud(command) for command in GCLOUD},
        "xpk": {command: xpk(command) for command in XPK},
    }
    FLAGS.write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
