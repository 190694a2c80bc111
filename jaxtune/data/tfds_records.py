"""Prepared TFDS datasets: where one is, a split of it, and its records as JSON lines give them."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxtune.core.errors import RequestError, nearest

# SPLIT may slice and add: train[:80%], train+test. The slice holds a colon of its own.
_SLICED = r"[\w\-]+(?:\[[^\[\]]*\])?"
_TFDS = re.compile(
    rf"(?P<name>.+?)(?::(?P<version>\d+\.\d+\.\d+))?:(?P<split>{_SLICED}(?:\+{_SLICED})*)"
)


def open_split(
    source: str, rest: str, key: str | None
) -> tuple[int, Callable[[int], dict[str, Any]]]:
    """Opens a split of a prepared dataset.

    Args:
        source: as the user wrote it.
        rest: what stands behind `tfds:`; NAME is a directory, or stands below $TFDS_DATA_DIR.
        key: config key named in errors.

    Returns:
        (number of records, index → record).

    Raises:
        RequestError: no such dataset, version, config or split, or one that cannot be read at
            random.
    """
    match = _TFDS.fullmatch(rest)
    if match is None:
        raise RequestError(
            f"source {source!r} must read tfds:NAME[/CONFIG][:VERSION]:SPLIT", key=key
        )
    directory = find_directory(match["name"], match["version"], key)
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
    return size, lambda i: restore_record(data[i])


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def find_directory(name: str, version: str | None, key: str | None) -> Path:
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


def restore_record(record: Any) -> dict[str, Any]:
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


def _merge_extra(record: dict[str, Any]) -> dict[str, Any]:
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
