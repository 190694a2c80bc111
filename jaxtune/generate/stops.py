"""Stop strings: where a text is to end."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from jaxtune.core.errors import RequestError

# The new ids of a row so far → how many of them to keep, the row being over; None: go on.
StopCheck = Callable[[list[int]], int | None]


def stop_at(decode: Callable[[list[int]], str], stops: Sequence[str]) -> StopCheck:
    """Returns the check that ends a row with the token that completes a stop string.

    That token may hold text before and behind the stop string, so the text is cut by `cut`.

    Args:
        decode: token ids → text.
        stops: the stop strings; whichever the text reaches first counts.

    Raises:
        RequestError: an empty stop string, which every text contains.
    """
    if any(not stop for stop in stops):
        raise RequestError("a stop string must not be empty", key="stop")

    def reached(ids: list[int]) -> bool:
        text = decode(ids)
        return any(stop in text for stop in stops)

    def check(ids: list[int]) -> int | None:
        if not reached(ids):
            return None
        low, high = 0, len(ids)  # the text of ids[:low] has no stop string, that of ids[:high] has
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if reached(ids[:middle]) else (middle, high)
        return high

    return check


def cut(text: str, stops: Sequence[str]) -> str:
    """Returns the text before the first stop string.

    >>> cut("yes.\\nUser: no", ["User:", "\\n"])
    'yes.'
    """
    places = [text.find(stop) for stop in stops]
    return text[: min((p for p in places if p >= 0), default=len(text))]
