"""Replacing an exported directory as a whole: the old one stays until the new one is complete."""

from __future__ import annotations

import contextlib
import fnmatch
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from jaxtune.core.errors import RequestError

# Left in every directory that an export wrote, which alone may be replaced: a base that was
# downloaded consists of files of the same names.
MARKER = ".jaxtune_export"
# What an export consists of; anything else is somebody's own file.
EXPORTED = (
    MARKER,
    "*.safetensors",
    "*.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "adapter_config.json",
    "jaxtune_adapter.json",
    "*.gguf",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "README.md",
)


@contextlib.contextmanager
def replaced(directory: str | os.PathLike[str]) -> Iterator[Path]:
    """Gives a new directory to fill, which takes the place of `directory` when the block ends.

    If the block raises, the new directory is removed and the old one is left as it was.

    Raises:
        RequestError: `directory` was not written by an export, or holds something that is no part
            of one, which replacing it would delete; or it cannot be written.
    """
    final = Path(os.path.abspath(directory))
    check_replaceable(final)
    aside, old = (final.with_name(f".{final.name}.{part}") for part in ("partial", "old"))
    try:
        shutil.rmtree(aside, ignore_errors=True)  # left by an export that was killed
        aside.mkdir(parents=True)
    except OSError as error:
        raise RequestError(f"cannot be written: {error.strerror}", where=directory) from error
    try:
        yield aside
        (aside / MARKER).write_text("Written by jaxtune; an export may replace this directory.\n")
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    if final.exists():
        shutil.rmtree(old, ignore_errors=True)
        final.rename(old)
    aside.rename(final)
    shutil.rmtree(old, ignore_errors=True)


def check_replaceable(directory: Path) -> None:
    """Refuses a path that is a file, or a directory with anything but an export of ours."""
    if directory.is_symlink() or (directory.exists() and not directory.is_dir()):
        raise RequestError("is no plain directory; name a new one", where=directory)
    if not directory.exists():
        return
    entries = sorted(directory.iterdir())
    for entry in entries:
        known = any(fnmatch.fnmatch(entry.name, pattern) for pattern in EXPORTED)
        if entry.is_dir() or not known:
            raise RequestError(
                f"holds {entry.name!r}, which is no part of an export and would be lost; "
                "name a new directory",
                where=directory,
            )
    if entries and not (directory / MARKER).is_file():
        raise RequestError(
            "was not written by an export of jaxtune and would be lost; name a new directory",
            where=directory,
        )
