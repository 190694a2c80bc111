"""Which model a verb works on: --model and --adapter, or a run's --workdir."""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib

from jaxtune.cli.arguments import Split
from jaxtune.core.errors import RequestError
from jaxtune.core.places import is_remote


@dataclasses.dataclass(frozen=True)
class Source:
    """A directory with a model, Hugging Face's or a run's, and an adapter on top of it."""

    path: pathlib.Path
    adapter: str | None


def find(split: Split, args: argparse.Namespace) -> Source:
    """Returns the model that the arguments name.

    A `--config` beside a `--workdir` must be the config of that run.

    Raises:
        RequestError: for no model, two, or one that is not there.
    """
    if args.model is not None and (split.config is not None or args.workdir is not None):
        raise RequestError("takes the place of --config and --workdir: give one", key="--model")
    if args.adapter is not None and args.model is None:
        raise RequestError("needs --model=DIR, its base", key="--adapter")
    if args.model is None and args.workdir is None:
        raise RequestError("give --model=DIR or --workdir=DIR")
    flag = "--workdir" if args.model is None else "--model"
    path = _directory(args.workdir if args.model is None else args.model, flag)
    if args.adapter is not None:
        args.adapter = str(_directory(args.adapter, "--adapter"))
    if split.config is not None:
        _same_config(split, path)
    return Source(path, args.adapter)


def _directory(name: str, flag: str) -> pathlib.Path:
    if name.startswith("hub:") or is_remote(name):
        from jaxtune.checkpoints.hub import local_directory

        return local_directory(name, flag)
    path = pathlib.Path(name)
    if not path.is_dir():
        reason = "is not a directory" if path.exists() else "no such directory"
        raise RequestError(f"{reason}: {name!r}", key=flag)
    return path


def _same_config(split: Split, workdir: pathlib.Path) -> None:
    from jaxtune.cli import config_file
    from jaxtune.recipes.schema.resolve import changes, resolve

    path = workdir / "config.json"
    if not path.is_file():
        raise RequestError("holds no run: there is no config.json", key="--workdir", where=workdir)
    try:
        old = resolve(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, RecursionError) as error:
        raise RequestError(f"is damaged: {error}", where=path) from None
    loaded = config_file.load(split.config, split.overrides)
    for key, before, now in changes(old, loaded.resolve()):
        raise RequestError(f"is {now!r}, but the run in {workdir} has {before!r}", key=key)
