"""Cleaned copies: rows taken out or changed, with a log of each."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from jaxtune.core.errors import RequestError
from jaxtune.data.doctor import pii, texts
from jaxtune.data.doctor.diagnose import Diagnosis
from jaxtune.data.doctor.kinds import ALL, BIT, BY_NAME, names_of
from jaxtune.data.doctor.workers import open_tokenizer
from jaxtune.data.formats import parse

FIXABLE = frozenset(kind.name for kind in ALL if kind.fix)


def outputs(found: Diagnosis, out: str | os.PathLike[str]) -> list[Path]:
    """Returns the file of each input: OUT, or OUT with the input's name if there are several."""
    path = Path(out)
    if len(found.rows) == 1:
        return [path]
    return [
        path.with_name(f"{path.stem}.{item.name}{path.suffix}") for item in found.settings.inputs
    ]


def log_of(path: Path) -> Path:
    """Returns where the log of a cleaned copy is."""
    return path.with_name(f"{path.stem}.log.jsonl")


def fix(
    found: Diagnosis, out: str | os.PathLike[str], kinds: frozenset[str] = FIXABLE
) -> list[dict[str, Any]]:
    """Writes a cleaned copy of each input, and beside it a log with a line for each change.

    Rows without a fixable finding are copied byte for byte, in order. Of near duplicates only as
    many are removed as leaves none; a row that a change leaves without a target is removed.

    Args:
        found: what was found; its spool must still be there.
        out: the copy, as JSON lines.
        kinds: what to fix.

    Returns:
        `{"input", "file", "log", "kept", "changed", "removed"}` of each input.

    Raises:
        RequestError: a file would be written over a source.
    """
    targets = outputs(found, out)
    sources = {Path(item.source.partition(":")[2]).resolve() for item in found.settings.inputs}
    for target in (path for each in targets for path in (each, log_of(each))):
        if target.resolve() in sources:
            raise RequestError("is a source itself", key="--fix", where=target)
        if not target.parent.is_dir():
            raise RequestError("no such directory", key="--fix", where=target.parent)
    tokenizer = open_tokenizer(found.settings)
    tokens = (*(tokenizer.hf.all_special_tokens if tokenizer else ()), *texts.KNOWN_SPECIAL)
    special = texts.special_pattern(tokens)
    bos = tokenizer.bos_id if tokenizer else None
    changes = _changes(special)
    return [
        _fix_input(found, number, target, kinds, changes, bos)
        for number, target in enumerate(targets)
    ]


def _changes(special: Any) -> dict[str, Callable[[str], str]]:
    """What is done to each text of a row, in order."""
    return {
        "mojibake": texts.repair_encoding,
        "control_character": lambda text: texts.CONTROL.sub("", text),
        "special_token": lambda text: special.sub("", text),
        **{
            kind: lambda text, kind=kind: pii.mask(text, kind)
            for kind in ("secret", "email", "phone", "card", "iban")
        },
    }


@contextlib.contextmanager
def _aside(path: Path) -> Iterator[TextIO]:
    part = path.with_name(f".{path.name}.part")
    try:
        with part.open("w", encoding="utf-8", newline="\n") as file:
            yield file
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _fix_input(
    found: Diagnosis,
    number: int,
    target: Path,
    kinds: frozenset[str],
    changes: dict[str, Callable[[str], str]],
    bos: int | None,
) -> dict[str, Any]:
    item, rows, start = found.settings.inputs[number], found.rows[number], int(found.starts[number])
    wanted = np.uint64(sum(BIT[kind] for kind in kinds & FIXABLE))
    flags = found.flags[start : start + rows.size] & wanted
    # A near duplicate of a removed row stays: it is the first of its words then.
    spared = found.spared[(found.spared >= start) & (found.spared < start + rows.size)] - start
    flags[spared] &= ~np.uint64(BIT["near_duplicate"])
    counts = {"kept": 0, "changed": 0, "removed": 0}
    with _aside(target) as file, _aside(log_of(target)) as log:

        def note(row: int, action: str, reasons: list[str], **more: Any) -> None:
            entry = {
                "input": item.name, "line": rows.line(row), "action": action, "kinds": reasons,
                "reason": "; ".join(_reason(found, start + row, kind) for kind in reasons), **more,
            }  # fmt: skip
            log.write(json.dumps(entry, ensure_ascii=False) + "\n")

        for span in rows.spans():
            lines = rows.raw(span) if rows.path is not None else [None] * span.count
            for (row, record), raw in zip(rows.read(span), lines, strict=True):
                reasons = names_of(int(flags[row]))
                removing = [kind for kind in reasons if BY_NAME[kind].fix == "remove"]
                if removing:
                    counts["removed"] += 1
                    note(row, "removed", removing)
                    continue
                if reasons:
                    record = _changed(record, [k for k in changes if k in reasons], changes)
                    if "doubled_bos" in reasons:
                        record = _single_bos(record, bos)
                    try:
                        parse(record, item.format)
                    except RequestError as error:
                        counts["removed"] += 1
                        note(row, "removed", reasons, left=error.message)
                        continue
                    counts["changed"] += 1
                    note(row, "changed", reasons)
                    raw = None
                counts["kept"] += 1
                text = raw.decode("utf-8").rstrip("\r") if raw is not None else _line(record)
                file.write(text + "\n")
    return {"input": item.name, "file": str(target), "log": str(log_of(target)), **counts}


def _line(record: Any) -> str:
    return json.dumps(record, ensure_ascii=False)


def _reason(found: Diagnosis, row: int, kind: str) -> str:
    if found.index is not None and row in found.items.get(kind, ()):
        return f"{BY_NAME[kind].about}: {found.index.where(found.items[kind][row])}"
    same = found.partner.get(kind)
    if same is None:
        return BY_NAME[kind].about
    at = int(np.searchsorted(same.rows, row))
    return f"{BY_NAME[kind].about}: {found.where(int(same.of[at]))}"


def _changed(value: Any, kinds: list[str], changes: dict[str, Callable[[str], str]]) -> Any:
    """Returns a record with every text in it changed."""
    if isinstance(value, str):
        for kind in kinds:
            value = changes[kind](value)
        return value
    if isinstance(value, dict):
        return {name: _changed(item, kinds, changes) for name, item in value.items()}
    if isinstance(value, list):
        return [_changed(item, kinds, changes) for item in value]
    return value


def _single_bos(record: dict[str, Any], bos: int | None) -> dict[str, Any]:
    """Returns a record of ids with one BOS; of words, the text form is a special token's matter."""
    ids = record.get("input_ids")
    if not isinstance(ids, list):
        return record
    extra = 0
    while ids[extra : extra + 2] == [bos, bos]:
        extra += 1
    out = {**record, "input_ids": ids[extra:]}
    if isinstance(record.get("loss_mask"), list):
        out["loss_mask"] = record["loss_mask"][extra:]
    return out
