"""The part of a run's report that is about its data: what was read, what was found in it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxtune.core import page as html
from jaxtune.core.page import Markup, without_directories
from jaxtune.training.workdir import read_json

# `jaxtune data doctor --json=WORKDIR/doctor.json` puts its findings into the run's report.
DOCTOR = "doctor.json"
PLACES = 3  # places of a finding that are shown


def data(workdir: Path, config: Mapping[str, Any], summary: Mapping[str, Any]) -> Markup | None:
    """Returns what became of the records, how long examples are, and what the doctor found."""
    train, stats = names_of(config["data"]["train"]), summary.get("data", {})
    parts = [counted(train, stats), reviewed(train, stats, config["data"]["seq_len"])]
    if summary.get("replay"):
        old = names_of(config["retention"]["replay_data"])
        parts += [html.paragraph("Replayed beside them:"), counted(old, summary["replay"])]
        parts.append(reviewed(old, summary["replay"], config["data"]["seq_len"]))
    parts.append(diagnosed(workdir, config))
    known = [part for part in parts if part is not None]
    return html.join(known) if known else None


def names_of(entries: Iterable[Mapping[str, Any]]) -> list[str]:
    """Returns sources by the last part of their place."""
    return [Path(entry["source"]).name for entry in entries]


def counted(sources: Sequence[str], stats: Mapping[str, Any]) -> Markup | None:
    """Returns the sources, and what became of their records."""
    if not stats.get("sources"):
        return None
    names = list(dict.fromkeys(name for counts in stats["sources"] for name in counts))
    rows = [(name, *(f"{counts.get(name, 0):,}" for counts in stats["sources"])) for name in names]
    header = ("", *sources)
    rest = {k: v for k, v in stats.items() if k != "sources" and isinstance(v, int | float)}
    told = ", ".join(f"{name.replace('_', ' ')}: {number(value)}" for name, value in rest.items())
    table = html.table(header, rows, numbers=range(1, len(header)))
    return html.join([table, html.paragraph(told, soft=True)])


def number(value: float) -> str:
    """Returns a number as a person reads it.

    >>> number(28715), number(0.24934)
    ('28,715', '0.2493')
    """
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"


def reviewed(sources: Sequence[str], stats: Mapping[str, Any], seq_len: int) -> Markup | None:
    """Returns lengths and repeats of each source; a line marks `data.seq_len`."""
    found = stats.get("review")
    if not found:
        return None
    parts = []
    for name, one in zip(sources, found, strict=True):
        label = f"{name}: examples by their tokens"
        parts.append(html.histogram(one["edges"], one["counts"], label, seq_len))
        repeated = f"{one['repeats']:,} of {one['compared']:,} examples repeat an earlier one"
        told = f"median {one['median']:,.4g}, 95 % {one['p95']:,.4g}, most {one['longest']:,}"
        parts.append(html.paragraph(f"{label}: {told}; {repeated}.", soft=True))
    return html.join(parts)


def diagnosed(workdir: Path, config: Mapping[str, Any]) -> Markup | None:
    """Returns the findings of the data doctor, where its JSON report lies in the workdir.

    Raises:
        RequestError: the file is damaged.
    """
    path = workdir / DOCTOR
    if not path.is_file():
        return None
    found = read_json(path)
    mine = {entry["source"] for key in ("train", "eval") for entry in config["data"][key]}
    others = sorted({item["source"] for item in found["inputs"]} - mine)
    told = f"The data doctor looked at {found['rows']:,} rows"
    told += f", {found['rows_without_finding']:,} of them without a finding."
    if others:
        told += f" Not data of this run: {', '.join(others)}."
    parts = [html.heading("Findings", 3), html.paragraph(told)]
    for finding in found["findings"]:
        kind = [
            html.element("span", html.text(finding["severity"]), css=finding["severity"]),
            html.element("b", html.text(finding["kind"])),
            html.text(f"{finding['count']:,} rows, {finding['share']:.2%}"),
        ]
        where = "; ".join(map(placed, finding["examples"][:PLACES]))
        shown = html.element("p", Markup(" ".join(kind)))
        parts.append(html.element("blockquote", shown, html.paragraph(where, soft=True)))
    return html.join(parts)


def placed(example: Mapping[str, Any]) -> str:
    """Returns where an example of a finding stands, and what is said of it.

    >>> placed({"where": "data/a.jsonl:3", "detail": "as data/b.jsonl:1"})
    'a.jsonl:3 (as b.jsonl:1)'
    """
    where, detail = (without_directories(example.get(name) or "") for name in ("where", "detail"))
    return f"{where} ({detail})" if detail else where
