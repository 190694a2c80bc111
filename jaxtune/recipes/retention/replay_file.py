"""A file of samples that grows aside, a block at a time, and has its name when it is whole.

`OUT` is complete wherever it is there, and `OUT.meta.json` beside it says what it was made from.
Until then the samples are in `.OUT.part`, and what they are being made from in `.OUT.part.json`:
the same command finds both and goes on behind the last whole block.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from jaxtune.core.errors import RequestError
from jaxtune.training.workdir import read_json, write_json

DIGEST = "blake2b"  # in OUT.meta.json: the hash of OUT
Facts = Mapping[str, Any]


def meta_path(out: Path) -> Path:
    """Returns where it stands what a file was made from."""
    return out.with_name(f"{out.name}.meta.json")


def part_path(out: Path) -> Path:
    """Returns where the samples are until the file is whole."""
    return out.with_name(f".{out.name}.part")


def read_finished(out: Path, facts: Facts) -> dict[str, Any] | None:
    """Returns what `OUT.meta.json` says of a file that is whole, or None if there is no file.

    Raises:
        RequestError: the file is of other facts, was changed since, or was not written here.
    """
    if not out.exists():
        return None
    meta = read_json(meta_path(out)) if meta_path(out).is_file() else None
    if meta is None or meta.get(DIGEST) != digest_of(out):
        raise RequestError(
            "is there already, and not as this command wrote it; name another file",
            key="--out",
            where=out,
        )
    _check_same(facts, meta, out, "is there already")
    return meta


@contextlib.contextmanager
def growing(out: Path, facts: Facts, block: int) -> Iterator[tuple[BinaryIO, int]]:
    """Opens `.OUT.part` for further lines; yields it and how many it has, a multiple of `block`.

    Args:
        out: the file that it becomes by `finish`.
        facts: what the samples follow from.
        block: lines that are written together; of an unfinished block nothing is kept.

    Raises:
        RequestError: another process is writing it, or it is of other facts.
    """
    part, told = part_path(out), part_path(out).with_suffix(".part.json")
    with part.open("ab+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RequestError(
                "another process is writing this file", key="--out", where=out
            ) from None
        file.seek(0)
        ends = [file.tell() for line in file if line.endswith(b"\n")]
        done = len(ends) // block * block
        if done:
            _check_same(facts, read_json(told), part, "is the beginning of this file")
        else:
            write_json(told, facts)
        file.truncate(ends[done - 1] if done else 0)
        yield file, done


def finish(out: Path, meta: Facts) -> dict[str, Any]:
    """Gives the samples their name; returns what `OUT.meta.json` then holds.

    Args:
        out: the file.
        meta: the facts, and what became of them.
    """
    part = part_path(out)
    whole = {**meta, DIGEST: digest_of(part)}
    write_json(meta_path(out), whole)  # first: a file with its name is never without
    os.replace(part, out)
    part.with_suffix(".part.json").unlink()
    return whole


def digest_of(path: Path) -> str:
    """Returns a hash of the content of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _check_same(facts: Facts, known: Facts, path: Path, what: str) -> None:
    """Raises RequestError if a file on disk was made from something else."""
    for name, value in json.loads(json.dumps(facts)).items():
        if known.get(name) != value:
            raise RequestError(
                f"{what}, made with {name} {known.get(name)!r}, not {value!r}; name another file, "
                "or remove it",
                key="--out",
                where=path,
            )
