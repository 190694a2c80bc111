"""Where metrics go besides `metrics.jsonl`: TensorBoard and Weights & Biases."""

from __future__ import annotations

import importlib.util
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jaxtune.core.errors import RequestError
from jaxtune.core.places import copy_up, is_remote

SECONDS_BETWEEN_COPIES = 120.0  # of event files to an object store
Write = Callable[[Mapping[str, Any]], None]


def tensorboard(directory: Path, start: int = 0) -> tuple[Write, Callable[[], None]]:
    """Returns (write a row, close) for TensorBoard event files.

    Args:
        directory: where they lie.
        start: steps done; what an earlier process wrote of later steps is no longer shown.
    """
    from tensorboardX import SummaryWriter

    here = Path(tempfile.mkdtemp(prefix="jaxtune-")) if is_remote(directory) else directory
    writer = SummaryWriter(str(here), purge_step=start + 1 if start else None)
    copied = time.monotonic()

    def write(row: Mapping[str, Any]) -> None:
        for name, value in row.items():
            if name != "step" and isinstance(value, int | float):
                writer.add_scalar(name, value, row["step"])
            elif isinstance(value, str):
                writer.add_text(name, value, row["step"])
        nonlocal copied
        if here is not directory and time.monotonic() - copied > SECONDS_BETWEEN_COPIES:
            writer.flush()
            copy_up(here, directory)
            copied = time.monotonic()

    def close() -> None:
        writer.close()
        if here is not directory:
            copy_up(here, directory)

    return write, close


def require_wandb() -> None:
    """Raises RequestError if the package wandb is not installed."""
    if importlib.util.find_spec("wandb") is None:
        raise RequestError("needs the package wandb: pip install 'jaxtune[wandb]'", key="log.wandb")


def wandb(workdir: Path, config: Mapping[str, Any]) -> tuple[Write, Callable[[], None]]:
    """Returns (write a row, close) for a Weights & Biases run that a later start continues."""
    import wandb as library

    remote = is_remote(workdir)
    whole = str(workdir).replace(":", "") if remote else workdir.absolute().as_posix()
    run = library.init(
        dir=None if remote else str(workdir),
        id=whole.strip("/").replace("/", "-")[-100:],
        name=workdir.name,
        config=dict(config),
        resume="allow",
    )

    def write(row: Mapping[str, Any]) -> None:
        run.log({name: value for name, value in row.items() if name != "step"}, step=row["step"])

    return write, run.finish
