"""The files of a run, each written so that a kill at any moment leaves it whole."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxtune.core.errors import RequestError
from jaxtune.core.places import is_remote

SECONDS_BETWEEN_WRITES = 30.0


def write_json(path: Path, value: Any) -> None:
    """Writes JSON to a file, whole or not at all."""
    write_whole(path, json.dumps(plain(value), indent=2) + "\n")


def write_whole(path: Path, text: str) -> None:
    """Writes beside the file, then renames it over: old or new, never half.

    An object store shows an object only when it is whole.
    """
    if is_remote(path):
        path.write_text(text)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.tmp")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)


def read_json(path: Path) -> dict[str, Any]:
    """Returns the JSON object of a file; RequestError if it is damaged."""
    try:
        value = json.loads(path.read_bytes().decode("utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        raise RequestError(f"cannot be read as JSON: {error}", where=path) from error
    if not isinstance(value, dict):
        raise RequestError(f"is damaged: expected an object, not {value!r:.40}", where=path)
    return value


def plain(value: Any) -> Any:
    """Returns a value that JSON can hold; numbers that are not finite become null."""
    if isinstance(value, Mapping):
        return {str(key): plain(child) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return [plain(child) for child in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Path):
        return str(value)
    return value


class MetricsFile:
    """`metrics.jsonl`, one object a line, in order of steps."""

    def __init__(self, path: Path):
        self.path = path

    def rows(self) -> list[dict[str, Any]]:
        """Returns the rows; a last line that a kill cut short is left out.

        Raises:
            RequestError: another line is not a row, with its line.
        """
        if not self.path.exists():
            return []
        rows = []
        lines = self.path.read_bytes().split(b"\n")
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
                row["step"] + 0
            except (ValueError, TypeError, KeyError, RecursionError) as error:
                if number == len(lines):  # without its newline: it was being written
                    break
                raise RequestError(
                    "is no row of metrics; repair or remove the line",
                    where=f"{self.path}:{number}",
                ) from error
            rows.append(row)
        return rows

    def rewind(self, step: int) -> list[dict[str, Any]]:
        """Drops the rows after `step`, which the run will write again; returns those that stay."""
        rows = [row for row in self.rows() if row["step"] <= step]
        write_whole(self.path, "".join(json.dumps(row) + "\n" for row in rows))
        return rows

    def append(self, row: Mapping[str, Any]) -> None:
        """Adds one row."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(plain(row)) + "\n")

    def flush(self) -> None:
        """Makes sure that the rows are in the file; on disk each one is at once."""


class RemoteMetricsFile(MetricsFile):
    """The same in an object store, whose objects do not grow: written anew now and then."""

    def __init__(self, path: Path):
        super().__init__(path)
        self.held: list[str] = []
        self.written, self.at = 0, time.monotonic()

    def rewind(self, step: int) -> list[dict[str, Any]]:
        """Drops the rows after `step`; returns those that stay."""
        rows = super().rewind(step)
        self.held = [json.dumps(row) + "\n" for row in rows]
        self.written = len(self.held)
        return rows

    def append(self, row: Mapping[str, Any]) -> None:
        """Adds one row, which is in the store within `SECONDS_BETWEEN_WRITES`, or by `flush`."""
        self.held.append(json.dumps(plain(row)) + "\n")
        if time.monotonic() - self.at > SECONDS_BETWEEN_WRITES:
            self.flush()

    def flush(self) -> None:
        """Writes the rows that are not in the store yet."""
        if self.written < len(self.held):
            write_whole(self.path, "".join(self.held))
        self.written, self.at = len(self.held), time.monotonic()


def metrics_file(path: Path) -> MetricsFile:
    """Returns the `metrics.jsonl` at a place."""
    return RemoteMetricsFile(path) if is_remote(path) else MetricsFile(path)
