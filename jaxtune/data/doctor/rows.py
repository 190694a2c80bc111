"""Rows of a source in spans that any process can read, however large the source.

Lines are found once and never held: a plain file is read in place, a packed one is unpacked to a
spool first, and a JSON array is written to it one object a line. What is wrong with a line is a
finding here, where `sources.open_source` raises.
"""

from __future__ import annotations

import gzip
import json
import os
import shutil
import zlib
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from jaxtune.core.errors import RequestError, nearest
from jaxtune.data.sources import Source, open_source

SPAN_BYTES = 1 << 18
_SPAN_RECORDS = 512  # of a source that is read by record
_BLOCK = 1 << 22


@dataclass(frozen=True)
class Span:
    """Consecutive rows.

    Attributes:
        first: number of the first row, from 0.
        count: rows.
        start, end: bytes of the file they stand in; unused where records are read by number.
    """

    first: int
    count: int
    start: int = 0
    end: int = 0


@dataclass(frozen=True)
class Fault:
    """A line that is no record."""

    kind: str
    message: str
    text: str


@dataclass
class Rows:
    """The rows of a source.

    Attributes:
        name: the source as the user wrote it.
        path: the file of lines, or None where `source` is read by record number.
        starts: int64 [rows], byte at which each line begins.
        lines: int64 [rows], number of the line in the user's file, from 1.
        size: number of rows.
    """

    name: str
    path: str | None
    size: int
    starts: np.ndarray = field(repr=False)
    lines: np.ndarray = field(repr=False)
    shown: str = ""

    def __getstate__(self) -> dict[str, Any]:
        # Workers get spans; the tables stay where they were made.
        empty = np.zeros(0, np.int64)
        return {
            "name": self.name, "path": self.path, "size": self.size, "shown": self.shown,
            "starts": empty, "lines": empty,
        }  # fmt: skip

    @cached_property
    def source(self) -> Source:
        """The source itself, where records are read by number."""
        return open_source(self.name)

    def spans(self) -> Iterator[Span]:
        """Yields spans that hold every row once, in order."""
        if self.path is None:
            for first in range(0, self.size, _SPAN_RECORDS):
                yield Span(first, min(_SPAN_RECORDS, self.size - first))
            return
        first, end_of_file = 0, os.path.getsize(self.path)
        while first < self.size:
            limit = int(self.starts[first]) + SPAN_BYTES
            stop = max(first + 1, int(np.searchsorted(self.starts, limit)))
            end = end_of_file if stop >= self.size else int(self.starts[stop])
            yield Span(first, stop - first, int(self.starts[first]), end)
            first = stop

    def read(self, span: Span) -> Iterator[tuple[int, Any]]:
        """Yields (row number, record or Fault)."""
        if self.path is None:
            for row in range(span.first, span.first + span.count):
                yield row, self.source[row]
            return
        row = span.first
        for raw in self.raw(span):
            yield row, parse_line(raw)
            row += 1

    def raw(self, span: Span) -> Iterator[bytes]:
        """Yields the lines of a span as they stand, without the ones that are blank."""
        with open(self.path, "rb") as file:
            file.seek(span.start)
            data = file.read(span.end - span.start)
        for line in data.split(b"\n"):
            if line.strip():
                yield line

    def span_of(self, row: int) -> Span:
        """Returns the span of one row."""
        if self.path is None:
            return Span(row, 1)
        last = row + 1 >= self.size
        end = os.path.getsize(self.path) if last else int(self.starts[row + 1])
        return Span(row, 1, int(self.starts[row]), end)

    def line(self, row: int) -> int:
        """Returns the line of a row; of a dataset, the number of the record."""
        return int(self.lines[row]) if len(self.lines) else row

    def where(self, row: int) -> str:
        """Returns `FILE:LINE`, or `SOURCE[i]`."""
        if not len(self.lines):
            return f"{self.name}[{row}]"
        return f"{self.shown}:{self.line(row)}"


def parse_line(raw: bytes) -> Any:
    """Returns the record of a line, or what is wrong with it."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        message = f"not UTF-8 (byte 0x{raw[error.start]:02x} at {error.start})"
        return Fault("not_utf8", message, raw.decode("utf-8", "replace"))
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        return Fault("invalid_json", f"not valid JSON: {error}", text)
    if not isinstance(record, dict):
        return Fault("invalid_json", "not a JSON object", text)
    return record


def open_rows(name: str, spool: Path, key: str | None = None) -> Rows:
    """Opens a source for the doctor.

    Args:
        name: as `sources.open_source` takes it.
        spool: an empty directory for what must be unpacked.
        key: flag or config key named in errors.

    Raises:
        RequestError: the source does not exist, is empty, or its packing is damaged.
    """
    kind, _, rest = name.partition(":")
    empty = np.zeros(0, np.int64)
    if kind != "jsonl" or not rest:
        source = open_source(name, key)
        if kind == "tfds":
            return Rows(name, None, len(source), empty, empty)
        return _spooled(name, rest, source, spool)
    path = Path(rest)
    if not path.is_file():
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        what = "is a directory, not a file" if path.is_dir() else "no such file"
        raise RequestError(f"{what}{nearest(path.name, siblings)}", key=key, where=path)
    with path.open("rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    plain = _unpack(path, spool / "lines", key) if packed else path
    with plain.open("rb") as file:
        head = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    if head[:1] == b"[":
        return _spooled(name, rest, open_source(name, key), spool)
    starts, lines = index_lines(plain)
    if not len(starts):
        raise RequestError("the file holds no record", key=key, where=path)
    return Rows(name, os.fspath(plain), len(starts), starts, lines, rest)


def index_lines(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Returns first byte and number, int64 [rows] both, of each line that is not blank."""
    starts, lines = array("q"), array("q")
    at, number = 0, 0
    with path.open("rb", buffering=_BLOCK) as file:
        for raw in file:
            number += 1
            skip = 3 if not at and raw[:3] == b"\xef\xbb\xbf" else 0  # a byte order mark
            if raw[skip:].strip():
                starts.append(at + skip)
                lines.append(number)
            at += len(raw)
    return np.frombuffer(starts, np.int64).copy(), np.frombuffer(lines, np.int64).copy()


def _unpack(path: Path, to: Path, key: str | None) -> Path:
    try:
        with gzip.open(path, "rb") as packed, to.open("wb") as plain:
            shutil.copyfileobj(packed, plain, _BLOCK)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise RequestError(f"damaged gzip file: {error}", key=key, where=path) from error
    return to


def _spooled(name: str, shown: str, source: Source, spool: Path) -> Rows:
    path = spool / "records"
    lines = array("q")
    with path.open("w", encoding="utf-8") as file:
        for index in range(len(source)):
            # Escaped, so that half a surrogate pair survives.
            file.write(json.dumps(source[index]) + "\n")
            place = source.where(index).rpartition(":")[2]
            lines.append(int(place.partition("[")[0]))
    starts, _ = index_lines(path)
    return Rows(name, os.fspath(path), len(source), starts, np.frombuffer(lines, np.int64), shown)
