"""Checks of one config value against its declaration."""

from __future__ import annotations

import math
import numbers
import os
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxtune.core.errors import RequestError, nearest
from jaxtune.recipes.schema.keys import ABSENT, REQUIRED, Key

SOURCES = ("jsonl:PATH", "text:PATH", "tfds:NAME[/CONFIG][:VERSION]:SPLIT")


# The largest int32, and the largest and the smallest positive float32 of full precision.
MOST = 2**31 - 1
LARGEST, SMALLEST = (float(x) for x in (np.finfo(np.float32).max, np.finfo(np.float32).tiny))


def alternatives(values: Sequence[str]) -> str:
    """Returns `'a'`, `'a' or 'b'`, or `'a', 'b' or 'c'`."""
    quoted = [repr(value) for value in values]
    return " or ".join(filter(None, (", ".join(quoted[:-1]), quoted[-1])))


def check(key: Key, value: Any, path: str | None = None) -> Any:
    """Returns the value in the type of the key.

    Args:
        key: declaration.
        value: what the user gave.
        path: dotted name for the error, where it is not the key's own (an element of a list).

    Raises:
        RequestError: naming the key, the value and what would be valid.
    """
    path = path or key.path
    if value is None:
        if key.optional:
            return None
        raise RequestError(f"must not be None; expected {_expected(key)}", key=path)
    return _BY_KIND[key.kind](key, value, path)


def _expected(key: Key) -> str:
    if key.kind == "choice":
        return alternatives(key.choices)
    words = {
        "int": "an integer",
        "float": "a number",
        "bool": "True or False",
        "text": "a string",
        "path": "a path",
        "regex": "a regular expression",
        "source": " or ".join(SOURCES),
        "targets": "'all-linear', a regular expression or a list of names",
        "patterns": "a list of regular expressions",
        "texts": "a list of strings, each once",
        "table": "a mapping",
        "groups": "{path regex: {lr_scale, weight_decay}}",
        "entries": f"a list of {{{', '.join(k.name for k in key.entry)}}}",
    }[key.kind]
    bounds = [
        f"{sign} {bound:g}"
        for sign, bound in (("≥", key.low), (">", key.above), ("≤", key.high), ("<", key.below))
        if bound is not None
    ]
    return " ".join((words, " and ".join(bounds))).strip()


def _wrong(key: Key, value: Any, path: str) -> RequestError:
    none = " or None" if key.optional else ""
    text = f"expected {_expected(key)}{none}; got {value!r}{unquoted(value)}"
    return RequestError(text, key=path)


def unquoted(value: Any) -> str:
    """Returns a hint if a list came as text, as it does once a shell has taken its quotes.

    >>> unquoted("[a, b]")
    '; the strings of a list are quoted, and so is the flag: \\'--config.KEY=["a", "b"]\\''
    >>> unquoted("[ab]_proj")
    ''
    """
    if not isinstance(value, str) or not re.fullmatch(r"\[[^\[\]'\"]*\]", value):
        return ""
    return '; the strings of a list are quoted, and so is the flag: \'--config.KEY=["a", "b"]\''


def _number(key: Key, value: Any, path: str) -> int | float:
    whole = key.kind == "int"
    if not isinstance(value, numbers.Integral if whole else numbers.Real):
        raise _wrong(key, value, path)
    # Steps are counted, and numbers computed with, in 32 bits.
    most = (MOST if whole else LARGEST) if key.high is None else key.high
    if isinstance(value, bool) or value != value or (abs(value) == math.inf):
        raise _wrong(key, value, path)
    if value > most:
        raise RequestError(f"{_short(value)} is more than {_short(most)}, the largest", key=path)
    if 0 < abs(value) < SMALLEST:
        raise RequestError(f"{value} is zero in 32 bits; the least is {SMALLEST:g}", key=path)
    inside = (
        (key.low is None or value >= key.low)
        and (key.above is None or value > key.above)
        and (key.below is None or value < key.below)
    )
    if not inside:
        raise _wrong(key, value, path)
    return int(value) if key.kind == "int" else float(value)


def _short(value: int | float) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return str(value) if abs(value) < 10**17 else "the number"


def _bool(key: Key, value: Any, path: str) -> bool:
    if not isinstance(value, bool):
        raise _wrong(key, value, path)
    return value


def _text(key: Key, value: Any, path: str) -> str:
    if isinstance(value, os.PathLike) and key.kind == "path":
        value = os.fspath(value)
    if not isinstance(value, str) or not value.strip():
        raise _wrong(key, value, path)
    return value


def _choice(key: Key, value: Any, path: str) -> str:
    if isinstance(value, str) and value in key.refused:
        raise RequestError(
            f"{value!r} {key.refused[value]}; valid: {alternatives(key.choices)}", key=path
        )
    if value not in key.choices:
        hint = nearest(value, key.choices) if isinstance(value, str) else ""
        raise RequestError(f"expected {alternatives(key.choices)}; got {value!r}{hint}", key=path)
    return value


def _source(key: Key, value: Any, path: str) -> str:
    if not isinstance(value, str):
        raise _wrong(key, value, path)
    kind, colon, rest = value.partition(":")
    if kind not in ("jsonl", "text", "tfds") or not colon:
        hint = (
            nearest(kind, ("jsonl", "text", "tfds"))
            if colon
            else f" (did you mean 'jsonl:{value}'?)"
        )
        raise RequestError(f"expected {' or '.join(SOURCES)}; got {value!r}{hint}", key=path)
    name, _, split = rest.rpartition(":")
    if not rest or (kind == "tfds" and not (name and split)):
        form = next(form for form in SOURCES if form.startswith(kind))
        raise RequestError(f"expected {form}; got {value!r}", key=path)
    return value


def _regex(key: Key, value: Any, path: str) -> str:
    if not isinstance(value, str) or not value:
        raise _wrong(key, value, path)
    try:
        re.compile(value)
    except re.error as error:
        raise RequestError(f"{value!r} is not a regular expression: {error}", key=path) from None
    return value


def _patterns(key: Key, value: Any, path: str) -> tuple[str, ...]:
    if not isinstance(value, list | tuple):
        raise _wrong(key, value, path)
    return tuple(_regex(key, item, f"{path}[{i}]") for i, item in enumerate(value))


def _texts(key: Key, value: Any, path: str) -> tuple[str, ...]:
    if not isinstance(value, list | tuple) or not all(isinstance(v, str) and v for v in value):
        raise _wrong(key, value, path)
    if len(set(value)) < len(value):
        raise _wrong(key, value, path)
    return tuple(value)


def _targets(key: Key, value: Any, path: str) -> str | tuple[str, ...]:
    if isinstance(value, str):
        return _regex(key, value, path)
    if not isinstance(value, list | tuple) or not value:
        raise _wrong(key, value, path)
    if not all(isinstance(name, str) and name for name in value) or len(set(value)) < len(value):
        raise RequestError(f"expected names, each once; got {value!r}", key=path)
    return tuple(value)


def _table(key: Key, value: Any, path: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _wrong(key, value, path)
    return dict(value)


def _entry(key: Key, value: Any, path: str) -> dict[str, Any]:
    """Checks one section of a list; `path` is the list's element."""
    valid = [inner.name for inner in key.entry]
    if not isinstance(value, dict):
        raise RequestError(f"expected {{{', '.join(valid)}}}; got {value!r}", key=path)
    for name in value:
        if name not in valid:
            raise RequestError(
                f"unknown key{nearest(name, valid)}; valid here: {', '.join(valid)}",
                key=f"{path}.{name}",
            )
    out = {}
    for inner in key.entry:
        where = f"{path}.{inner.name}"
        given = value.get(inner.name, ABSENT)
        if given is ABSENT and inner.default is REQUIRED:
            raise RequestError(f"missing: {inner.doc}", key=where)
        out[inner.name] = inner.default if given is ABSENT else check(inner, given, where)
    return out


def _entries(key: Key, value: Any, path: str) -> tuple[dict[str, Any], ...]:
    if not isinstance(value, list | tuple):
        raise _wrong(key, value, path)
    return tuple(_entry(key, item, f"{path}[{i}]") for i, item in enumerate(value))


def _groups(key: Key, value: Any, path: str) -> tuple[dict[str, Any], ...]:
    """Accepts {pattern: {…}} or [{pattern, …}] and returns the latter: JSON and order agree."""
    if isinstance(value, dict):
        items = []
        for pattern, rates in value.items():
            if not isinstance(rates, dict):
                raise _wrong(key, rates, f"{path}[{pattern!r}]")
            items.append((f"{path}[{pattern!r}]", {"pattern": pattern, **rates}))
    elif isinstance(value, list | tuple):
        items = [(f"{path}[{i}]", item) for i, item in enumerate(value)]
    else:
        raise _wrong(key, value, path)
    out = tuple(_entry(key, item, where) for where, item in items)
    patterns = [group["pattern"] for group in out]
    for (where, _), pattern in zip(items, patterns, strict=True):
        if patterns.count(pattern) > 1:
            raise RequestError(f"{pattern!r} is given twice", key=where)
    return out


_BY_KIND: dict[str, Callable[[Key, Any, str], Any]] = {
    "int": _number,
    "float": _number,
    "bool": _bool,
    "text": _text,
    "path": _text,
    "regex": _regex,
    "choice": _choice,
    "source": _source,
    "targets": _targets,
    "patterns": _patterns,
    "texts": _texts,
    "table": _table,
    "groups": _groups,
    "entries": _entries,
}
