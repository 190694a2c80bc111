"""`data inspect`: rows in colour, with what is trained, whose it is and where segments begin."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxtune.core.errors import RequestError
from jaxtune.data.chat import ROLE_NAMES
from jaxtune.data.prompts import Prompts, PromptStore
from jaxtune.data.stream import Stream
from jaxtune.data.token_store import TokenStore
from jaxtune.data.tokenizer import Tokenizer

_COLOURS = {
    "template": "grey50", "system": "magenta", "user": "blue", "assistant": "cyan",
    "tool": "yellow", "prompt": "blue", "completion": "cyan", "text": "cyan",
}  # fmt: skip
_TRAINED = "bold black on green"
_REJECTED = "bold black on red"


def inspect(
    data: TokenStore | Stream | Prompts,
    tokenizer: Tokenizer | None,
    n: int = 3,
    console: Any = None,
    start: int = 0,
) -> None:
    """Prints examples of a store, or rows of a stream as they are trained, and their counts.

    Trained tokens are black on green, or on red where they are not wanted; the others have the
    colour of their role, if the store was made with `keep_roles`. Without colours
    (`console.no_color`, or no terminal), a trained token stands in ⟦ ⟧. Of several completions, the
    prompt that they share is shown once, then each with its name.

    Args:
        data: examples or rows to show, or prompts.
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
    if isinstance(data, Prompts):
        _show_prompts(console, data, start, n)
        return
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
        number = 1
        for store, example in members:
            number = _show_example(console, stores[store], example, number, tokenizer)
    _counts(console, data, stores)


def _show_example(
    console: Any, store: TokenStore, example: int, number: int, tokenizer: Tokenizer | None
) -> int:
    """Prints an example that begins with segment `number`; returns the next one's."""
    ids, mask = store.example(example)
    roles, columns = store.example_roles(example), store.example_columns(example)
    branches = columns.get("branches")
    count = 1 if branches is None or store.shared else int(branches[-1])
    name = f"segment {number}" if count == 1 else f"segments {number}-{number + count - 1}"
    console.print(
        f"{name}: {store.where(example)}, {len(ids)} tokens, {int(np.count_nonzero(mask))} trained"
        + _judgement(store, mask, columns),
        style="dim",
        markup=False,
    )
    plain = not _colours(console)
    parts = [("", np.arange(len(ids)))]
    if branches is not None:
        names = [""] + [_side_name(store.format, b) for b in range(1, int(branches[-1]) + 1)]
        parts = [(name, np.flatnonzero(branches == b)) for b, name in enumerate(names)]
    for name, chosen in parts:
        if not len(chosen):
            continue
        if name:
            console.print(f"{name}:", style="dim", markup=False)
        unwanted = name == "rejected" or (
            store.format == "unpaired" and not store.values["label"][example]
        )
        shown = None if roles is None else roles[chosen]
        style = _REJECTED if unwanted else _TRAINED
        prompt = len(parts[0][1]) if name else 0
        console.print(
            token_text(
                ids[chosen],
                mask[chosen],
                shown,
                tokenizer,
                plain=plain,
                trained=style,
                before=ids[:prompt],
            )
        )
    return number + count


def _side_name(format: str, branch: int) -> str:
    if format == "preference":
        return ("chosen", "rejected")[branch - 1]
    return f"completion {branch}" + (", the best" if branch == 1 else "")


def _judgement(store: TokenStore, mask: np.ndarray, columns: Mapping[str, np.ndarray]) -> str:
    """Returns what is known of an example beside its tokens, for the line above it."""
    trained = mask > 0
    said = []
    if "label" in columns:
        labels = columns["label"][trained]
        shown = labels if store.format == "stepwise" else labels[:1]
        said.append("label " + " ".join(f"{value:g}" for value in shown))
    for name, usual in (("margin", 0.0), ("example_weight", 1.0)):
        value = float(columns[name][trained][0]) if name in columns else usual
        if value != usual:
            said.append(f"{name.removeprefix('example_')} {value:g}")
    return "".join(f", {words}" for words in said)


def _show_prompts(console: Any, prompts: Prompts, start: int, n: int) -> None:
    from rich.text import Text

    for at, number in enumerate(prompts.take(start, n), start):
        console.rule(f"prompt {at}", align="left")
        size = len(prompts.ids(number))
        console.print(f"{prompts.where(number)}, {size} tokens", style="dim", markup=False)
        console.print(Text(prompts.text(number), style=_COLOURS["prompt"]))
        for name, (value,) in prompts.columns([number]).items():
            console.print(Text(f"{name}: {value!r}", style=_COLOURS["template"]))
    _table(console, prompts.stores)


def token_text(
    ids: np.ndarray,
    mask: np.ndarray,
    roles: np.ndarray | None,
    tokenizer: Tokenizer | None,
    *,
    plain: bool = False,
    trained: str = _TRAINED,
    before: np.ndarray | None = None,
) -> Any:
    """Returns a `rich.text.Text` of the tokens, styled, or with marks in it if `plain`.

    Args:
        ids: int32 [T].
        mask: float32 [T].
        roles: uint8 [T], indices into `chat.ROLE_NAMES`, or None.
        tokenizer: writes ids as text; ids are shown as numbers if None.
        plain: puts ⟦ ⟧ around runs of trained tokens.
        trained: style of trained tokens.
        before: int32 [n], tokens that come before and are not shown.
    """
    from rich.text import Text

    roles = np.zeros(len(ids), np.uint8) if roles is None else roles
    text = Text()
    cuts = np.flatnonzero((np.diff(mask > 0) != 0) | (np.diff(roles) != 0)) + 1
    lead = 0 if before is None else len(before)
    pieces = _pieces(ids if not lead else np.concatenate([before, ids]), tokenizer)[lead:]
    for run in np.split(np.arange(len(ids)), cuts):
        target = bool(mask[run[0]] > 0)
        style = trained if target else _COLOURS[ROLE_NAMES[roles[run[0]]]]
        if plain and target and (run[0] == 0 or mask[run[0] - 1] == 0):
            text.append("⟦")
        for at in run:
            # Neighbours differ, so that the borders of tokens are seen.
            text.append(pieces[at], style=f"{style} underline" if at % 2 else style)
        if plain and target and (run[-1] + 1 == len(ids) or mask[run[-1] + 1] == 0):
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
    if _colours(console) and any(s.format in ("preference", "unpaired") for s in stores):
        legend.append("  ")
        legend.append("not wanted", _REJECTED)
    shown = {int(c) for s in stores if s.roles is not None for c in np.unique(s.roles)}
    for code in sorted(shown):
        legend.append("  ")
        legend.append(ROLE_NAMES[code], style=_COLOURS[ROLE_NAMES[code]])
    console.print(legend)


def _counts(console: Any, data: TokenStore | Stream, stores: tuple[TokenStore, ...]) -> None:
    _table(console, stores)
    if isinstance(data, Stream):
        stats = data.stats()
        console.print(
            f"epoch: {stats['examples_per_epoch']:,} examples, {stats['tokens_per_epoch']:,} "
            f"tokens in {stats['rows_per_epoch']:,} rows of {data.seq_len}, "
            f"{stats['efficiency']:.1%} full"
        )


def _table(console: Any, stores: Sequence[TokenStore | PromptStore]) -> None:
    from rich.table import Table

    # One line a count, so that it stays readable however narrow the terminal.
    table = Table("", *(store.source.name for store in stores), box=None, header_style="bold")
    counts = [store.counts.as_dict() for store in stores]
    for name in counts[0]:
        table.add_row(name, *(f"{c[name]:,}" for c in counts))
    console.print(table)
