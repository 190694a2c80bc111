"""Where records come from: JSON lines, plain text, prepared TFDS datasets."""

from __future__ import annotations

import gzip
import json
import mmap
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxtune.core.errors import RequestError, nearest
from jaxtune.data.json_array import read_array
from jaxtune.data.tfds_records import open_split

Record = dict[str, Any]


@dataclass(frozen=True)
class Source:
    """Records that can be read in any order.

    Attributes:
        name: the source as the user wrote it.
        size: number of records.
        read: returns the record of an index.
        place: returns where a record is, as `FILE:LINE`, `FILE:LINE[i]` (array) or `NAME[i]`.
    """

    name: str
    size: int
    read: Callable[[int], Record]
    place: Callable[[int], str]

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < self.size:
            raise IndexError(index)
        return self.read(index)

    def where(self, index: int) -> str:
        """Returns the place of record `index`, for error messages."""
        return self.place(index)


def open_source(source: str, key: str | None = None, *, lazily: bool = False) -> Source:
    """Opens `jsonl:PATH[.gz]`, `text:PATH[.gz]` or `tfds:NAME[/CONFIG][:VERSION]:SPLIT`.

    Everything that can be wrong with a file is found here: each line of a JSON lines file is read.
    A `jsonl:` file may be one JSON array of objects instead. A `text:` file is one record,
    `{"text": ...}`. The NAME of `tfds:` is a dataset below $TFDS_DATA_DIR, or a directory that
    `data prepare` wrote.

    Args:
        source: kind and place.
        key: config key named in errors.
        lazily: reads a JSON line when it is asked for, and finds there what is wrong with it; for
            one of several processes, which asks for its part.

    Raises:
        RequestError: the source does not exist or is damaged, with `FILE:LINE`.
    """
    kind, colon, rest = str(source).partition(":")
    kinds: dict[str, Callable[[str, str, str | None], Source]] = {
        "jsonl": _open_lines if lazily else _open_jsonl,
        "text": _open_text,
        "tfds": _open_tfds,
    }
    if not colon or kind not in kinds:
        raise RequestError(
            f"source {source!r} must begin with jsonl:, text: or tfds:{nearest(kind, kinds)}",
            key=key,
        )
    if not rest:
        raise RequestError(f"source {source!r} names nothing after {kind}:", key=key)
    return kinds[kind](source, rest, key)


def _read_bytes(path: Path, key: str | None) -> bytes:
    if path.is_dir():
        raise RequestError("is a directory, not a file", key=key, where=path)
    if not path.is_file():
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise RequestError(f"no such file{nearest(path.name, siblings)}", key=key, where=path)
    try:
        data = path.read_bytes()
        # By content as well as by name: both a .gz that is none and a nameless gzip occur.
        if data[:2] == b"\x1f\x8b":
            data = gzip.decompress(data)
        elif path.suffix == ".gz" and data:
            raise RequestError("not a gzip file, though its name ends in .gz", key=key, where=path)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise RequestError(f"damaged gzip file: {error}", key=key, where=path) from error
    except OSError as error:
        raise RequestError(f"cannot be read: {error.strerror}", key=key, where=path) from error
    return data.removeprefix(b"\xef\xbb\xbf")  # some editors write a byte order mark


def _decode(data: bytes, key: str | None, path: Path, line: int) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line += data.count(b"\n", 0, error.start)
        raise RequestError(
            f"not UTF-8 (byte 0x{data[error.start]:02x})", key=key, where=f"{path}:{line}"
        ) from error


def _open_text(source: str, rest: str, key: str | None) -> Source:
    path = Path(rest)
    text = _decode(_read_bytes(path, key), key, path, 1)
    if not text.strip():
        raise RequestError("the file is empty", key=key, where=path)
    return Source(source, 1, lambda _: {"text": text}, lambda _: f"{path}:1")


def _open_jsonl(source: str, rest: str, key: str | None) -> Source:
    path = Path(rest)
    data = _read_bytes(path, key)
    if data.lstrip()[:1] == b"[":
        return _open_array(source, path, _decode(data, key, path, 1), key)
    records: list[Record] = []
    lines: list[int] = []
    for number, raw in enumerate(data.split(b"\n"), 1):
        if not raw.strip():
            continue
        records.append(_parse_line(_decode(raw, key, path, number), key, f"{path}:{number}"))
        lines.append(number)
    if not records:
        raise RequestError("the file holds no record", key=key, where=path)
    return Source(source, len(records), records.__getitem__, lambda i: f"{path}:{lines[i]}")


def _open_lines(source: str, rest: str, key: str | None) -> Source:
    """Opens JSON lines of which only the places are kept; a file that is not packed is mapped."""
    path = Path(rest)
    data: bytes | mmap.mmap = b""
    if path.is_file() and path.stat().st_size:
        with path.open("rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    if data[:2] == b"\x1f\x8b" or path.suffix == ".gz" or not data:
        data = _read_bytes(path, key)
    start = 3 if data[:3] == b"\xef\xbb\xbf" else 0
    if data[start : start + 4096].lstrip()[:1] == b"[":
        return _open_jsonl(source, rest, key)
    spans: list[tuple[int, int, int]] = []
    number = 0
    while start < len(data):
        number += 1
        end = data.find(b"\n", start)
        end = len(data) if end < 0 else end
        if data[start:end].strip():
            spans.append((start, end, number))
        start = end + 1
    if not spans:
        raise RequestError("the file holds no record", key=key, where=path)

    def read(index: int) -> Record:
        start, end, number = spans[index]
        text = _decode(data[start:end], key, path, number)
        return _parse_line(text, key, f"{path}:{number}")

    return Source(source, len(spans), read, lambda i: f"{path}:{spans[i][2]}")


def _open_array(source: str, path: Path, text: str, key: str | None) -> Source:
    try:
        items, lines = read_array(text)
    except RequestError as error:
        raise RequestError(error.message, key=key, where=f"{path}:{error.where}") from None
    if not items:
        raise RequestError("the file holds no record", key=key, where=path)
    # Many items may stand on one line, so that the line alone does not name them.
    places = [f"{path}:{line}[{i}]" for i, line in enumerate(lines)]
    for item, where in zip(items, places, strict=True):
        _check_record(item, key, where)
    return Source(source, len(items), items.__getitem__, places.__getitem__)


def _open_tfds(source: str, rest: str, key: str | None) -> Source:
    size, read = open_split(source, rest, key)
    return Source(source, size, read, lambda i: f"{source}[{i}]")


def _parse_line(line: str, key: str | None, where: str) -> Record:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise RequestError(
            f"not valid JSON: {error.msg} (column {error.colno})", key=key, where=where
        ) from error
    except (ValueError, RecursionError) as error:
        raise RequestError(f"not valid JSON: {error}", key=key, where=where) from error
    _check_record(record, key, where, escaped="\\ud" in line or "\\uD" in line)
    return record


def _check_record(record: Any, key: str | None, where: str, escaped: bool = True) -> None:
    if not isinstance(record, dict):
        raise RequestError(
            f"a JSON {json_type(record)}, not an object; write one object on each line",
            key=key,
            where=where,
        )
    if escaped:
        try:
            json.dumps(record, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError as error:
            raise RequestError("holds half of a surrogate pair", key=key, where=where) from error


def json_type(value: Any) -> str:
    """Returns what JSON calls the type of `value`: "string", "number", "object", ..."""
    names = {dict: "object", list: "array", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")
