"""One process of a run in several: `python -m tests.correctness.process_run` CONFIG WORKDIR PORT
COUNT RANK. It has 4 / COUNT devices and ends once the save of step $STOP_AFTER_SAVE is whole.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from tests.conftest import xla_flags


def run(config: Path, workdir: Path, port: int, count: int, rank: int, stop: int) -> str:
    """Trains as one of `count` processes; returns "stopped"."""
    import jax

    from jaxtune.parallel import processes

    processes.join(f"127.0.0.1:{port},{count},{rank}")
    assert jax.device_count() == 4 and jax.process_count() == count
    import jaxtune
    from tests.correctness import interrupts

    with interrupts.after_the_save(stop):
        jaxtune.train(json.loads(config.read_text()), workdir)
    processes.part(None, 0)
    return "stopped"


if __name__ == "__main__":
    config, workdir, *numbers = sys.argv[1:]
    port, count, rank = map(int, numbers)
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = xla_flags(devices=4 // count)
    stop = int(os.environ["STOP_AFTER_SAVE"])
    print(run(Path(config), Path(workdir), port, count, rank, stop))
