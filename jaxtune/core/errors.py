"""What is told in one line: a request that cannot be honoured, a failure that is not ours."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class RequestError(ValueError):
    """The user's config, data, checkpoint or path is wrong; the command line exits with code 2.

    Args:
        message: one line saying what is wrong and what would be valid.
        key: the config key at fault, dotted, such as `peft.rank`.
        where: the place at fault, `FILE:LINE` or `FILE`.
    """

    def __init__(self, message: str, *, key: str | None = None, where: object | None = None):
        self.message = " ".join(str(message).split())
        self.key = key
        self.where = None if where is None else str(where)
        shown = None if self.where is None else shortened(self.where)
        super().__init__(": ".join(p for p in (shown, key, self.message) if p))


class RunFailure(RuntimeError):
    """A run met what is no fault of its program, a full disk or a lost server; one line says what.

    The command line prints that line and exits with code 1.
    """


def shortened(path: str) -> str:
    """Returns a path that fits on a line; the middle of a very long one is left out.

    >>> shortened("a" * 3000 + "/b")[-6:]
    'aaaa/b'
    """
    return path if len(path) <= 400 else f"{path[:200]}…{path[-100:]}"


def nearest(name: str, valid: Iterable[str]) -> str:
    """Returns ` (did you mean 'x'?)` for the valid name closest to `name`, or an empty string.

    >>> nearest("rnak", ["rank", "alpha"])
    " (did you mean 'rank'?)"
    """
    close = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""
