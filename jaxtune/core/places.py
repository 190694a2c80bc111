"""Paths on disk, and in object stores: `gs://BUCKET/…` and `s3://BUCKET/…`."""

from __future__ import annotations

import importlib.util
import os
import tempfile
from pathlib import Path

from jaxtune.core.errors import RequestError

# What reads and writes a store from Python, besides TensorStore's own code for arrays.
PACKAGES = {"gs": "gcsfs", "s3": "s3fs"}


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Tells whether a path names a place in an object store."""
    return "://" in os.fspath(path)


def place(path: str | os.PathLike[str], key: str | None = None) -> Path:
    """Returns a path whose methods are those of `pathlib`, on disk or in an object store.

    Args:
        path: a path or `SCHEME://BUCKET/…`.
        key: flag or config key named in errors.

    Raises:
        RequestError: another scheme, or the package for it is not installed.

    >>> place("runs/first").name
    'first'
    """
    text = os.fspath(path)
    if not is_remote(text):
        return Path(text)
    scheme = text.partition("://")[0]
    if scheme not in PACKAGES:
        known = " or ".join(f"{name}://" for name in PACKAGES)
        raise RequestError(f"{text!r} is neither a path nor {known}", key=key)
    if importlib.util.find_spec(PACKAGES[scheme]) is None:
        raise RequestError(
            f"{scheme}:// needs the package {PACKAGES[scheme]}: pip install 'jaxtune[{scheme}]'",
            key=key,
        )
    from etils import epath

    return epath.Path(text)


def local_copy(directory: Path) -> Path:
    """Returns the directory, or for one in an object store a copy of its files on disk.

    The copy lies among the system's temporary files, which the system clears.
    """
    if not is_remote(directory):
        return directory
    copy = Path(tempfile.mkdtemp(prefix="jaxtune-"))
    for path in directory.iterdir():
        if path.is_file():
            (copy / path.name).write_bytes(path.read_bytes())
    return copy


def copy_up(source: Path, target: Path) -> None:
    """Copies the files below a directory on disk to one in an object store."""
    for path in sorted(source.rglob("*")):
        if path.is_file():
            (target / path.relative_to(source).as_posix()).write_bytes(path.read_bytes())


def move(source: Path, target: Path) -> None:
    """Moves a directory; in an object store, object by object."""
    if not is_remote(source):
        target.parent.mkdir(parents=True, exist_ok=True)
        source.rename(target)
        return
    _copy_objects(source, target)
    source.rmtree(missing_ok=True)


def _copy_objects(source: Path, target: Path) -> None:
    for path in source.iterdir():
        if path.is_dir():
            _copy_objects(path, target / path.name)
        else:
            (target / path.name).write_bytes(path.read_bytes())
