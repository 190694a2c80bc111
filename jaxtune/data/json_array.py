"""A file that is one JSON array of objects, read with the line on which each object begins."""

from __future__ import annotations

import json
import re
from typing import Any

from jaxtune.core.errors import RequestError

_SPACE = re.compile(r"[ \t\r\n]*")


def read_array(text: str) -> tuple[list[Any], list[int]]:
    """Returns the items of a JSON array and the line, from 1, on which each begins.

    Raises:
        RequestError: the text is no array, with the line as `where`.
    """
    decoder = json.JSONDecoder()
    items: list[Any] = []
    lines: list[int] = []
    at, line, counted = _skip(text, text.index("[") + 1), 1, 0

    def fail(message: str, position: int) -> RequestError:
        return RequestError(
            f"not a valid JSON array: {message}", where=str(1 + text.count("\n", 0, position))
        )

    while not text.startswith("]", at):
        line += text.count("\n", counted, at)
        counted = at
        try:
            item, end = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            raise fail(error.msg, error.pos) from error
        except (ValueError, RecursionError) as error:
            raise fail(str(error), at) from error
        items.append(item)
        lines.append(line)
        at = _skip(text, end)
        if text.startswith(",", at):
            at = _skip(text, at + 1)
            if text.startswith("]", at):
                raise fail("a comma before the closing bracket", at)
        elif not text.startswith("]", at):
            raise fail("expected a comma or the closing bracket", at)
    rest = _skip(text, at + 1)
    if rest != len(text):
        raise fail("something follows its closing bracket", rest)
    return items, lines


def _skip(text: str, at: int) -> int:
    match = _SPACE.match(text, at)
    return match.end() if match else at
