"""`data inspect`: rows in colour, with what is trained, whose it is and where segments begin."""

from __future__ import annotations

from typing import Any

import numpy as np

from jaxtune.core.errors import RequestError
from jaxtune.data.chat import ROLE_NAMES
from jaxtune.data.store import TokenStore
from jaxtune.data.stream import Stream
from jaxtune.data.tokenizer import Tokenizer

_COLOURS = {
    "template": "grey50", "system": "magenta", "user": "blue", "assistant": "cyan",
    "tool": "yellow", "prompt": "blue", "completion": "cyan", "text": "cyan",
}  # fmt: skip
_TRAINED = "bold black on green"


def inspect(
    data: TokenStore | Stream,
    tokenizer: Tokenizer | None,
    n: int = 3,
    console: Any = None,
    start: int = 0,
) -> None:
    """Prints examples of a store, or rows of a stream as they are trained, and their counts.

    Trained tokens are black on green; the others have the colour of their role, if the store was
    made with `keep_roles`. Without colours (`console.no_color`, or no terminal), a trained token
    stands in ⟦ ⟧.

    Args:
        data: examples or rows to show.
        tokenizer: writes ids as text; ids are shown as numbers if None.
        n: how many.
        console: a `rich.console.Console`; the terminal if None.
        start: first example or row.

    Raises:
        RequestError: a store has no example there.
    """
    from rich.console import Console

    console = console or Console(highlight=False)
    if isinstance(data, TokenStore) and start >= len(data):
        raise RequestError(f"there are {len(data)} examples; {start} is beyond them", key="--start")
    if isinstance(data, Stream):
        segments = [[data.examples_of_row(r), f"row {r}"] for r in range(start, start + n)]
        stores = data.stores
    else:
        chosen = range(start, min(start + n, len(data)))
        segments = [[[(0, i)], f"example {i}"] for i in chosen]
        stores = (data,)
    _legend(console, stores)
    for members, title in segments:
        console.rule(title, align="left")
        for number, (store, example) in enumerate(members, 1):
            ids, mask = stores[store].example(example)
            console.print(
                f"segment {number}: {stores[store].where(example)}, {len(ids)} tokens, "
                f"{int(np.count_nonzero(mask))} trained",
                style="dim",
                markup=False,
            )
            roles = stores[store].example_roles(example)
            console.print(token_text(ids, mask, roles, tokenizer, plain=not _colours(console)))
    _counts(console, data, stores)


def token_text(
    ids: np.ndarray,
    mask: np.ndarray,
    roles: np.ndarray | None,
    tokenizer: Tokenizer | None,
    *,
    plain: bool = False,
) -> Any:
    """Returns a `rich.text.Text` of the tokens, styled, or with marks in it if `plain`.

    Args:
        ids: int32 [T].
        mask: float32 [T].
        roles: uint8 [T], indices into `chat.ROLE_NAMES`, or None.
        tokenizer: writes ids as text; ids are shown as numbers if None.
        plain: puts ⟦ ⟧ around runs of trained tokens.
    """
    from rich.text import Text

    roles = np.zeros(len(ids), np.uint8) if roles is None else roles
    text = Text()
    cuts = np.flatnonzero((np.diff(mask > 0) != 0) | (np.diff(roles) != 0)) + 1
    pieces = _pieces(ids, tokenizer)
    for run in np.split(np.arange(len(ids)), cuts):
        trained = bool(mask[run[0]] > 0)
        style = _TRAINED if trained else _COLOURS[ROLE_NAMES[roles[run[0]]]]
        if plain and trained and (run[0] == 0 or mask[run[0] - 1] == 0):
            text.append("⟦")
        for at in run:
            # Neighbours differ, so that the borders of tokens are seen.
            text.append(pieces[at], style=f"{style} underline" if at % 2 else style)
        if plain and trained and (run[-1] + 1 == len(ids) or mask[run[-1] + 1] == 0):
            text.append("⟧")
    return text


def _pieces(ids: np.ndarray, tokenizer: Tokenizer | None) -> list[str]:
    """Returns what each token adds to the text before it; "·" if its character goes on."""
    if tokenizer is None:
        return [f"{i} " for i in ids]
    out = []
    for end in range(1, len(ids) + 1):
        # A few tokens before it are context enough for leading spaces and split characters.
        begin = max(0, end - 6)
        before = tokenizer.decode(ids[begin : end - 1]).rstrip("�")
        after = tokenizer.decode(ids[begin:end])
        whole = after.startswith(before) and not after.endswith("�")
        out.append(after[len(before) :].replace("\n", "↵\n") if whole else "·")
    return out


def _colours(console: Any) -> bool:
    return console.color_system is not None and not console.no_color


def _legend(console: Any, stores: tuple[TokenStore, ...]) -> None:
    from rich.text import Text

    legend = Text()
    legend.append(*("trained", _TRAINED) if _colours(console) else ("⟦trained⟧",))
    shown = {int(c) for s in stores if s.roles is not None for c in np.unique(s.roles)}
    for code in sorted(shown):
        legend.append("  ")
        legend.append(ROLE_NAMES[code], style=_COLOURS[ROLE_NAMES[code]])
    console.print(legend)


def _counts(console: Any, data: TokenStore | Stream, stores: tuple[TokenStore, ...]) -> None:
    from rich.table import Table

    # One line a count, so that it stays readable however narrow the terminal.
    table = Table("", *(store.source.name for store in stores), box=None, header_style="bold")
    counts = [store.counts.as_dict() for store in stores]
    for name in counts[0]:
        table.add_row(name, *(f"{c[name]:,}" for c in counts))
    console.print(table)
    if isinstance(data, Stream):
        stats = data.stats()
        console.print(
            f"epoch: {stats['examples_per_epoch']:,} examples, {stats['tokens_per_epoch']:,} "
            f"tokens in {stats['rows_per_epoch']:,} rows of {data.seq_len}, "
            f"{stats['efficiency']:.1%} full"
        )
