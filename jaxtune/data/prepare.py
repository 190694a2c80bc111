"""`data prepare`: JSON lines to a TFDS dataset of ArrayRecord files, which is read at random."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxtune.core.errors import RequestError
from jaxtune.data.formats import check_format, parse
from jaxtune.data.sources import Record, Source, open_source

VERSION = "1.0.0"

# Fields of each format that become features of their own; all others are kept as JSON text.
_TEXT_FIELDS = {
    "chat": (),
    "completion": ("prompt", "completion"),
    "instruction": ("instruction", "input", "output"),
    "text": ("text",),
    "tokens": (),
    # Messages in their place are kept as JSON text.
    "preference": ("prompt", "chosen", "rejected"),
    "unpaired": ("prompt", "completion"),
    "ranked": ("prompt",),
    "stepwise": ("prompt",),
    "prompt": ("prompt",),
}


def prepare(
    source: str | Source,
    format: str,
    out_dir: str | os.PathLike[str],
    name: str,
    *,
    splits: Mapping[str, float] | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Writes the records of a source as a TFDS dataset and checks every record on the way.

    Reading it back (`tfds:OUT_DIR/NAME:SPLIT`) gives records equal to the JSON ones. The dataset
    is written aside and moved into place, so that it is there whole or not at all.

    Args:
        source: the records, such as `jsonl:PATH`.
        format: a name in `formats.FORMATS`.
        out_dir: TFDS data directory.
        name: of the dataset: a lower-case letter, then letters, digits and underscores.
        splits: fraction of the records in each split; they sum to 1. One split, `train`, if None.
        seed: of the choice of records for the splits.

    Returns:
        `{"directory", "splits": {name: records}}`.

    Raises:
        RequestError: the source or a record is wrong, or the dataset exists already.
    """
    check_format(format, "format")
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise RequestError(
            f"{name!r} must be a lower-case letter, then letters, digits and underscores",
            key="name",
        )
    records = open_source(source, "source") if isinstance(source, str) else source
    parts = split_records(len(records), splits or {"train": 1.0}, seed)
    directory = Path(out_dir) / name / VERSION
    if directory.exists():
        raise RequestError("the dataset exists already; choose another name", where=directory)
    for index in range(len(records)):
        parse(records[index], format, where=records.where(index))
    try:
        Path(out_dir).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RequestError(f"cannot be made: {error.strerror}", where=out_dir) from error
    with tempfile.TemporaryDirectory(dir=out_dir, prefix=f".{name}-") as aside:
        _write(records, format, Path(aside), name, parts)
        directory.parent.mkdir(exist_ok=True)
        shutil.move(os.fspath(Path(aside) / name / VERSION), directory)
    return {
        "directory": os.fspath(directory),
        "splits": {split: len(rows) for split, rows in parts.items()},
    }


def split_records(size: int, splits: Mapping[str, float], seed: int) -> dict[str, np.ndarray]:
    """Divides records 0..size-1 at random; indices ascend within a split, which is never empty.

    Raises:
        RequestError: fractions are not positive or do not sum to 1, or a split would be empty.
    """
    fractions = list(splits.values())
    if not fractions or min(fractions) <= 0 or abs(sum(fractions) - 1) > 1e-6:
        raise RequestError(f"fractions {dict(splits)} must be positive and sum to 1", key="splits")
    for split in splits:
        if not re.fullmatch(r"[a-z]\w*", split) or split == "all":
            raise RequestError(f"{split!r} is no name for a split", key="splits")
    bounds = np.rint(np.cumsum([0.0, *fractions]) * size).astype(int)
    order = np.argsort(np.random.Philox(key=seed % 2**64).random_raw(size), kind="stable")
    parts = {
        split: np.sort(order[start:end])
        for split, start, end in zip(splits, bounds[:-1], bounds[1:], strict=True)
    }
    for split, rows in parts.items():
        if not len(rows):
            raise RequestError(f"split {split!r} would get none of {size} records", key="splits")
    return parts


def _write(
    records: Source, format: str, data_dir: Path, name: str, parts: Mapping[str, np.ndarray]
) -> None:
    import tensorflow_datasets as tfds

    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        """Holds the records of one source."""

        VERSION = tfds.core.Version(globals()["VERSION"])
        # Nothing is downloaded, so there are no checksums to look for beside the code; looking
        # for it needs a package that TFDS does not install.
        code_path = None

        def _info(self) -> Any:
            return tfds.core.DatasetInfo(
                builder=self,
                description=f"{records.name}, format {format}; written by jaxtune data prepare.",
                features=_features(format),
                disable_shuffling=True,
            )

        def _split_generators(self, _: Any) -> dict[str, Any]:
            return {split: self._generate_examples(rows) for split, rows in parts.items()}

        def _generate_examples(self, rows: Iterable[int]) -> Iterator[tuple[int, Record]]:
            for key, row in enumerate(rows):
                yield key, _to_features(records[int(row)], format)

    Builder.name = name
    tfds.display_progress_bar(False)
    with contextlib.redirect_stdout(io.StringIO()):  # TFDS prints, whatever the log level
        Builder(data_dir=os.fspath(data_dir), file_format="array_record").download_and_prepare()


def _features(format: str) -> Any:
    import tensorflow_datasets as tfds

    text = tfds.features.Text()
    features: dict[str, Any] = {field: text for field in _TEXT_FIELDS[format]}
    if format == "chat":
        turn = {"role": text, "content": text, "extra_json": text}
        features["messages"] = tfds.features.Sequence(turn)
    if format == "tokens":
        features["input_ids"] = tfds.features.Sequence(np.int32)
        features["loss_mask"] = tfds.features.Sequence(np.float32)
    return tfds.features.FeaturesDict(features | {"extra_json": text})


def _to_features(record: Record, format: str) -> Record:
    """Splits a record into the fields that are features and the JSON text of the others."""
    if format == "tokens":
        fields: Record = {"input_ids": list, "loss_mask": list}
    else:
        fields = dict.fromkeys(_TEXT_FIELDS[format], str)
    if format == "chat":
        rest = {k: v for k, v in record.items() if k != "messages"}
        if "messages" not in record:  # ShareGPT's conversations: all of it is kept as JSON
            return {"messages": [], "extra_json": _json({**rest, "": ["messages"]})}
        turns = [_divide(m, {"role": str, "content": str}) for m in record["messages"]]
        return {"messages": turns, "extra_json": _json(rest)}
    return _divide(record, fields)


def _divide(record: Record, fields: Mapping[str, type]) -> Record:
    """Fields that are missing, or null, stand as empty and are named in the JSON text."""
    out: Record = {}
    rest = {k: v for k, v in record.items() if k not in fields}
    for field, kind in fields.items():
        value = record.get(field)
        if isinstance(value, kind) and _fits(value):
            out[field] = value
        else:
            out[field] = kind()
            if field in record:
                rest[field] = value
            else:
                rest.setdefault("", []).append(field)
    out["extra_json"] = _json(rest)
    return out


def _fits(value: Any) -> bool:
    """Whether a feature gives the value back: float32 must hold each number of a list."""
    if not isinstance(value, list):
        return True
    with np.errstate(over="ignore"):
        return all(abs(v) < 2**31 and float(np.float32(v)) == v for v in value)


def _json(fields: Record) -> str:
    return json.dumps(fields, ensure_ascii=False) if fields else ""
