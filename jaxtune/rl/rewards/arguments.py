"""Checks of what the config gives a built-in reward."""

from __future__ import annotations

import re
from typing import Any

from jaxtune.core.errors import RequestError


def expect(holds: bool, name: str, value: Any, expected: str) -> None:
    """Raises RequestError(key=name) unless `holds`."""
    if not holds:
        raise RequestError(f"expected {expected}; got {value!r}", key=name)


def flag(name: str, value: Any) -> None:
    """Checks a bool."""
    expect(isinstance(value, bool), name, value, "True or False")


def text(name: str, value: Any) -> None:
    """Checks a string that is not empty."""
    expect(isinstance(value, str) and value != "", name, value, "a string that is not empty")


def number(name: str, value: Any, low: float, high: float = float("inf")) -> None:
    """Checks a number within closed bounds."""
    fine = isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high
    most = "" if high == float("inf") else f" and ≤ {high:g}"
    expect(fine, name, value, f"a number ≥ {low:g}{most}")


def whole(name: str, value: Any, low: int) -> None:
    """Checks an integer."""
    fine = isinstance(value, int) and not isinstance(value, bool) and value >= low
    expect(fine, name, value, f"an integer ≥ {low}")


def choice(name: str, value: Any, valid: tuple[str, ...]) -> None:
    """Checks one of several words."""
    expect(value in valid, name, value, " or ".join(map(repr, valid)))


def pattern(name: str, value: Any) -> re.Pattern[str]:
    """Returns a compiled regular expression; `.` matches line ends too."""
    text(name, value)
    try:
        return re.compile(value, re.DOTALL)
    except re.error as error:
        raise RequestError(f"{value!r} is not a regular expression: {error}", key=name) from None
