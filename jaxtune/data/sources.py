"""Where records come from: JSON lines, plain text, prepared TFDS datasets."""

from __future__ import annotations

import gzip
import json
import mmap
import os
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxtune.core.errors import RequestError, nearest
from jaxtune.data.json_array import read_array

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


# SPLIT may slice and add: train[:80%], train+test. The slice holds a colon of its own.
_SLICED = r"[\w\-]+(?:\[[^\[\]]*\])?"
_TFDS = re.compile(
    rf"(?P<name>.+?)(?::(?P<version>\d+\.\d+\.\d+))?:(?P<split>{_SLICED}(?:\+{_SLICED})*)"
)


def _open_tfds(source: str, rest: str, key: str | None) -> Source:
    match = _TFDS.fullmatch(rest)
    if match is None:
        raise RequestError(
            f"source {source!r} must read tfds:NAME[/CONFIG][:VERSION]:SPLIT", key=key
        )
    directory = _tfds_directory(match["name"], match["version"], key)
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder_from_directory(os.fspath(directory))
    except Exception as error:  # damaged metadata fails in many ways inside tfds
        raise RequestError(
            f"not a readable TFDS dataset: {_first_line(error)}", key=key, where=directory
        ) from error
    splits = sorted(builder.info.splits)
    for part in match["split"].split("+"):
        base = part.partition("[")[0]
        if base not in splits and base != "all":
            raise RequestError(
                f"no split {base!r}{nearest(base, splits)}; it has {', '.join(splits)}",
                key=key,
                where=directory,
            )
    try:
        data = builder.as_data_source(match["split"])
        size = len(data)
    except Exception as error:  # unknown file formats, bad slices, missing shards
        raise RequestError(
            f"split {match['split']!r} cannot be read at random (written as ArrayRecord?): "
            f"{_first_line(error)}",
            key=key,
            where=directory,
        ) from error
    if not size:
        raise RequestError(f"split {match['split']!r} is empty", key=key, where=directory)
    return Source(
        source,
        size,
        lambda i: restore_record(data[i]),
        lambda i: f"{source}[{i}]",
    )


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _tfds_directory(name: str, version: str | None, key: str | None) -> Path:
    """Finds the directory of a prepared dataset: the one that holds dataset_info.json."""
    root = Path(os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")).expanduser()
    for base in (Path(name), root / name):
        if (base / "dataset_info.json").is_file():
            return base
        found = sorted(
            (d.parent for d in base.glob("*/dataset_info.json")),
            key=lambda d: [int(n) if n.isdigit() else -1 for n in d.name.split(".")],
        )
        if version is not None:
            wanted = [d for d in found if d.name == version]
            if found and not wanted:
                have = ", ".join(d.name for d in found)
                raise RequestError(f"no version {version!r}; it has {have}", key=key, where=base)
            found = wanted
        if found:
            return found[-1]
        configs = sorted(d.parent.parent.name for d in base.glob("*/*/dataset_info.json"))
        if configs:
            raise RequestError(
                f"name one of its configs: {', '.join(configs)}", key=key, where=base
            )
    near = nearest(name, [d.name for d in root.iterdir()] if root.is_dir() else [])
    raise RequestError(
        f"no prepared TFDS dataset {name!r}{near}, as a directory or under {root} "
        "(TFDS_DATA_DIR); `jaxtune data prepare` makes one",
        key=key,
    )


def restore_record(record: Any) -> Record:
    """Turns what TFDS gives back into what JSON lines give: str, int, float, list, dict.

    TFDS holds a list of objects as an object of lists, and `data prepare` keeps the fields that
    its features do not name as JSON text in `extra_json`; both are undone here.
    """
    plain = _plain(record)
    messages = plain.get("messages")
    if isinstance(messages, dict):
        columns = list(messages)
        turns = [
            dict(zip(columns, row, strict=True))
            for row in zip(*(messages[c] for c in columns), strict=True)
        ]
        plain["messages"] = [_merge_extra(turn) for turn in turns]
    return _merge_extra(plain)


def _merge_extra(record: Record) -> Record:
    extra = record.pop("extra_json", None)
    if extra:
        extra = json.loads(extra)
        for absent in extra.pop("", ()):  # fields that the JSON line did not have
            record.pop(absent)
        record.update(extra)
    return record


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode("utf-8")
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):  # NumPy scalars and arrays
        return _plain(value.tolist())
    return value
