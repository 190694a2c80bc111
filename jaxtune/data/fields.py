"""Reading the fields of a record strictly, one helper a type."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxtune.core.errors import RequestError, nearest
from jaxtune.data.sources import Record, json_type

_LARGEST = float(np.finfo(np.float32).max)


def present(record: Record, name: str) -> Any:
    """Returns the value of a field that must be there.

    Raises:
        RequestError: it is not, with the fields that are.
    """
    if name not in record:
        have = ", ".join(map(str, record)) or "none"
        near = nearest(name, [str(field) for field in record])
        raise RequestError(f"no field {name!r} among its fields: {have}{near}")
    return record[name]


def text(record: Record, name: str, *, default: Any = ..., filled: bool = False) -> str:
    """Returns a field that is a string.

    Args:
        record: the fields.
        name: of the field.
        default: for a field that is missing or null; if not given, that is an error.
        filled: refuses white space alone.

    Raises:
        RequestError: missing, of another type, or empty.
    """
    if default is not ... and record.get(name) is None:
        return default
    return text_value(present(record, name), f"field {name!r}", filled=filled)


def text_value(value: Any, at: str, *, filled: bool = False) -> str:
    """Returns a value that is a string; `at` names it in errors."""
    if not isinstance(value, str):
        raise RequestError(f"{at} must be a string, not {json_type(value)}")
    if filled and not value.strip():
        raise RequestError(f"{at} is empty, which leaves nothing to train on")
    return value


def number(value: Any, at: str, *, low: float = -math.inf, high: float = math.inf) -> float:
    """Returns a number that float32 holds, in low..high; `at` names it in errors."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise RequestError(f"{at} must be a number, not {json_type(value)}")
    if not -_LARGEST <= value <= _LARGEST:
        raise RequestError(f"{at} must be finite in 32 bits, not {value!r}")
    if not low <= value <= high:
        bounds = f"{low:g} to {high:g}" if high < math.inf else f"{low:g} or more"
        raise RequestError(f"{at} must be {bounds}, not {value!r}")
    return float(value)


def optional_number(record: Record, name: str, default: float, **bounds: float) -> float:
    """Returns a field that is a number, or `default` where it is missing or null."""
    value = record.get(name)
    return default if value is None else number(value, f"field {name!r}", **bounds)


def array(record: Record, name: str) -> Sequence[Any]:
    """Returns a field that is an array.

    Raises:
        RequestError: missing, or of another type.
    """
    value = present(record, name)
    if not isinstance(value, list):
        raise RequestError(f"field {name!r} must be an array, not {json_type(value)}")
    return value
