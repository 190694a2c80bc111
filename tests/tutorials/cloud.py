"""Runs the TPU page on a laptop of its own, against the cloud of `tests/tpu_scripts`.

python -m tests.tutorials.cloud [--write]
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.tpu_scripts.world import ROOT, World, build, demolish, executable

PAGE = ROOT / "docs" / "tutorials" / "tpu.md"


def laptop(directory: Path) -> World:
    """Returns a world in which a reader has this checkout, no settings yet, and no patience."""
    world = build(directory)
    shutil.rmtree(world.laptop / "configs")
    shutil.copytree(ROOT / "configs", world.laptop / "configs")
    executable(world.laptop / "bin" / "sleep", "#!/bin/sh\nexec /bin/sleep 0.05\n")
    (world.laptop / "tpu_scripts" / "env").unlink()
    return world


def follow(world: World, *flags: str) -> subprocess.CompletedProcess:
    """Runs the page's blocks on the laptop, with Python and jaxtune of this process."""
    python = Path(sys.executable)
    environment = {
        **os.environ,
        "PATH": f"{world.laptop / 'bin'}:{python.parent}:{os.environ['PATH']}",
        "HOME": str(world.laptop / "home"),
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": "",
    }
    return subprocess.run(
        [python, "-m", "tests.tutorials.runner", PAGE, *flags],
        cwd=world.laptop,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as directory:
        world = laptop(Path(directory))
        try:
            done = follow(world, *sys.argv[1:])
            print(done.stdout, done.stderr, sep="\n")
        finally:
            demolish(world)
    sys.exit(done.returncode)
