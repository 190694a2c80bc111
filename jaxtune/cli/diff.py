"""`jaxtune diff`: what differs between two runs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from jaxtune.cli import arguments

TITLES = {
    "config": "config",
    "data": "fingerprints of data and weights",
    "code": "code and machine",
    "results": "results",
}


def run(argv: Sequence[str]) -> int:
    """Runs the verb and returns its exit code."""
    parser = arguments.Parser(
        "diff",
        "Shows what differs between two runs: config, data, code and results.",
        """jaxtune diff runs/first runs/second
           jaxtune diff runs/first runs/second --json""",
    )
    parser.add_argument("one", metavar="RUN_A", help="workdir of a run")
    parser.add_argument("two", metavar="RUN_B", help="workdir of the other")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse(argv)

    from jaxtune.recipes.report import diff

    found = diff.diff(args.one, args.two)
    if args.json:
        print(json.dumps(found))
    else:
        show(found)
    return 0


def show(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Prints a table for each section."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    for section, rows in found.items():
        if not rows:
            console.print(f"{TITLES[section]}: no difference", highlight=False)
            continue
        columns = ("", "A", "B", *(["change"] if section == "results" else []))
        table = Table(title=TITLES[section], title_justify="left")
        for column in columns:
            table.add_column(column, overflow="fold")
        for row in rows:
            cells = [row["key"], text(row["a"]), text(row["b"])]
            if section == "results":
                change = row["change"]
                cells.append("" if change is None else f"{change:+.5g}")
            table.add_row(*cells)
        console.print(table, markup=False)


def text(value: Any) -> str:
    """Returns a value as a person reads it.

    >>> text(0.123456789), text(None), text([1])
    ('0.12346', '', '[1]')
    """
    if value is None:
        return ""
    return f"{value:.5g}" if isinstance(value, float) else str(value)
