"""The report as one self-contained page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxtune.core import page as html
from jaxtune.core.page import Markup, element, text, without_directories
from jaxtune.data.doctor.language import UNKNOWN

_LINES_SHOWN = 60


def as_page(report: Mapping[str, Any]) -> str:
    """Returns the HTML of a report as `report.report` makes it."""
    names = ", ".join(item["name"] for item in report["inputs"])
    return html.page(
        f"Data report: {names}",
        _head(report),
        html.heading("Findings"),
        _findings(report),
        html.heading("Lengths"),
        *(_lengths(name, found) for name, found in report["lengths"].items()),
        html.heading("Languages"),
        _shares(report["languages"], "language", unknown=True),
        html.heading("Balance"),
        *_balance(report["balance"]),
        html.heading("Groups"),
        *_groups(report["groups"]),
        *_evaluations(report),
        *_fixed(report),
        html.heading("Not checked"),
        _not_checked(report),
    )


def _head(report: Mapping[str, Any]) -> Markup:
    count = dict.fromkeys(("error", "warning", "info"), 0)
    for entry in report["findings"]:
        count[entry["severity"]] += 1
    clean = report["rows_without_finding"] / max(report["rows"], 1)
    figures = [
        ("rows", f"{report['rows']:,}"),
        ("without a finding", f"{clean:.1%}"),
        ("kinds of error", str(count["error"])),
        ("kinds of warning", str(count["warning"])),
    ]
    where = f"Tokenizer: {report['tokenizer'] or 'none'}; seq_len: {report['seq_len'] or 'none'}."
    return html.join(
        [
            html.cards(figures),
            *(_input(item) for item in report["inputs"]),
            html.paragraph(where, soft=True),
        ]
    )


def _input(item: Mapping[str, Any]) -> Markup:
    split = "" if item["split"] == item["name"] else f", split {item['split']}"
    about = f": {item['rows']:,} rows of format {item['format']}{split}, "
    return element(
        "p", element("b", text(item["name"])), text(about), element("code", text(item["source"]))
    )


def _findings(report: Mapping[str, Any]) -> Markup:
    if not report["findings"]:
        return html.paragraph("Nothing was found.")
    told = html.paragraph("Personal data and secrets are masked.", soft=True)
    return html.join([told, *(_finding(entry) for entry in report["findings"])])


def _finding(entry: Mapping[str, Any]) -> Markup:
    title = html.join(
        [
            element("span", text(entry["severity"]), css=entry["severity"]),
            element("b", text(entry["kind"])),
            text(f"{entry['count']:,} rows, {entry['share']:.2%}"),
        ]
    )
    parts = [html.paragraph(entry["about"][:1].upper() + entry["about"][1:] + ".")]
    for example in entry["examples"]:
        line = element("code", text(without_directories(example["where"])))
        words = html.join([line, text(f" {without_directories(example['detail'])}")])
        shown = [element("p", words)]
        if example["text"]:
            shown.append(element("p", text(example["text"]), css="soft"))
        parts.append(element("blockquote", *shown))
    for name, numbers in entry["lines"].items():
        listed = ", ".join(map(str, numbers[:_LINES_SHOWN]))
        more = entry["counts"][name] - min(len(numbers), _LINES_SHOWN)
        tail = f" and {more:,} more" if more else ""
        parts.append(html.paragraph(f"{name}, lines {listed}{tail}", soft=True))
    return html.folded(title, *parts)


def _lengths(name: str, found: Mapping[str, Any]) -> Markup:
    unit = "tokens" if "tokens" in found else "characters"
    figures = found[unit]
    parts = [html.heading(f"{name}: {unit} a row", 3)]
    if not figures["count"]:
        return html.join([*parts, html.paragraph("No row has a length.")])
    fit = found.get("fit")
    bins = figures["histogram"]
    mark = fit["seq_len"] if fit else None
    label = f"Histogram of {unit} a row of {name}"
    parts.append(html.histogram(bins["edges"], bins["counts"], label, mark))
    percentiles = figures["percentiles"]
    header = ("mean", "min", *(f"{p} %" for p in percentiles), "max")
    row = (f"{figures['mean']:,}", figures["min"], *percentiles.values(), figures["max"])
    shown = [f"{v:,}" if isinstance(v, int) else v for v in row]
    parts.append(html.table(header, [shown], numbers=range(len(header))))
    if fit:
        cards = [
            ("rows cut", f"{fit['overlong']:,}"),
            ("tokens cut", f"{fit['tokens_cut']:,}"),
            ("padding, one a row", f"{fit['padding_share']:.1%}"),
            ("packed rows", f"{fit['packed_rows']:,}"),
            ("packed rows are full", f"{fit['packing_efficiency']:.1%}"),
        ]
        parts += [html.paragraph(f"At seq_len {fit['seq_len']:,}:"), html.cards(cards)]
    return html.join(parts)


def _shares(entries: list[Mapping[str, Any]], name: str, *, unknown: bool = False) -> Markup:
    rows = [
        (
            "too short or unclear" if unknown and entry["value"] == UNKNOWN else entry["value"],
            f"{entry['count']:,}",
            f"{entry['share']:.2%}",
        )
        for entry in entries
    ]
    return html.table((name, "rows", "share"), rows, numbers=(1, 2))


def _balance(balance: Mapping[str, Any]) -> list[Markup]:
    parts = []
    labels = balance["labels"]
    if labels:
        parts.append(html.heading("Labels", 3))
        parts.append(
            html.paragraph(
                f"{labels['different']} different short answers; the largest has "
                f"{labels['largest_share']:.1%}; evenness {labels['evenness']:.2f} of 1."
            )
        )
        parts.append(_shares(labels["top"], "label"))
    for name, entries in balance["fields"].items():
        parts += [html.heading(f"Field {name}", 3), _shares(entries, name)]
    if balance["topics"]:
        rows = [(", ".join(t["terms"]), f"{t['share']:.1%}") for t in balance["topics"]]
        parts += [html.heading("Topics", 3), html.table(("words", "rows"), rows, numbers=(1,))]
    if balance["openings"]:
        shown = _shares(balance["openings"], "first words of the answer")
        parts.append(html.folded(text("Openings of answers"), shown))
    if balance["terms"]:
        listed = ", ".join(f"{e['value']} ({e['share']:.1%})" for e in balance["terms"])
        parts.append(html.folded(text("Frequent words"), html.paragraph(listed)))
    return parts or [html.paragraph("No labels, fields or repeated openings.")]


def _groups(groups: Mapping[str, Any]) -> list[Markup]:
    parts = []
    for axis, found in groups.items():
        rows = [
            (name, f"{g['rows']:,}", f"{g['answer_words']:.1f}", f"{g['refusal_share']:.2%}")
            for name, g in found["groups"].items()
        ]
        header = ("prompts that name", "rows", "words an answer", "refusals")
        parts += [html.heading(axis, 3), html.table(header, rows, numbers=(1, 2, 3))]
        for pair in found["pairs"]:
            one, two = pair["groups"]
            if not pair["prompts"]:
                words = f"No prompt occurs with {one} and with {two}."
            else:
                words = (
                    f"{pair['prompts']:,} prompts occur with {one} and with {two}: the answers to "
                    f"the former have {pair['word_difference']:+.2f} words, "
                    f"{pair['same_answer_share']:.1%} are the same, and "
                    f"{pair['refuses_only_first']} against {pair['refuses_only_second']} refuse on "
                    "one side only."
                )
            parts.append(html.paragraph(words))
    return parts or [html.paragraph("No prompt names one group.")]


def _evaluations(report: Mapping[str, Any]) -> list[Markup]:
    if not report["evaluations"]:
        return []
    rows = [
        (e["name"], element("code", text(e["source"])), f"{e['items']:,}")
        for e in report["evaluations"]
    ]
    return [
        html.heading("Compared with"),
        html.table(("evaluation set", "source", "items"), rows, numbers=(2,)),
    ]


def _fixed(report: Mapping[str, Any]) -> list[Markup]:
    if "fixed" not in report:
        return []
    rows = [
        (f["input"], element("code", text(f["file"])), *(f"{f[k]:,}" for k in _FIXED))
        for f in report["fixed"]
    ]
    header = ("input", "file", *_FIXED)
    return [html.heading("Cleaned copies"), html.table(header, rows, numbers=(2, 3, 4))]


_FIXED = ("kept", "changed", "removed")


def _not_checked(report: Mapping[str, Any]) -> Markup:
    if not report["not_checked"]:
        return html.paragraph("Everything was checked.")
    rows = [(element("code", text(k)), why) for k, why in report["not_checked"].items()]
    return html.table(("kind", "why"), rows)
