"""The findings as one JSON object, whose schema docs/doctor.md has."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxtune.core.page import without_directories
from jaxtune.data.doctor import lengths
from jaxtune.data.doctor.diagnose import Diagnosis
from jaxtune.data.doctor.kinds import ALL, SEVERITIES, Kind
from jaxtune.data.doctor.language import UNKNOWN
from jaxtune.data.doctor.tally import ranked
from jaxtune.data.doctor.topics import topics

SCHEMA = 1
_TOP = 20
# Answers are labels if so few different ones do for so many rows; else they are free text.
_MOST_LABELS, _ROWS_A_LABEL = 200, 5
# A term that stands in fewer rows is rare, in more it is grammar.
_TERM_SHARE = (0.002, 0.2)
_WHY_NOT = {
    "tokenizer": "needs --tokenizer or --model",
    "seq_len": "needs --seq_len and a tokenizer",
    "splits": "needs two splits",
    "against": "needs --against",
    "words": "needs --words",
}


def report(found: Diagnosis) -> dict[str, Any]:
    """Returns the report of a diagnosis; nothing in it is personal, texts are masked."""
    settings, total = found.settings, len(found.flags)
    given = settings.given()
    return {
        "schema": SCHEMA,
        "inputs": [
            {
                "name": item.name,
                "source": item.source,
                "format": item.format,
                "split": item.split,
                "rows": rows.size,
            }
            for item, rows in zip(settings.inputs, found.rows, strict=True)
        ],
        "tokenizer": settings.tokenizer,
        "seq_len": settings.seq_len,
        "near": settings.near,
        "rows": total,
        "rows_without_finding": int(np.count_nonzero(found.flags == 0)),
        "findings": _findings(found),
        "not_checked": {k.name: _WHY_NOT[k.needs] for k in ALL if k.needs not in given},
        "lengths": {
            item.name: _lengths(found, number) for number, item in enumerate(settings.inputs)
        },
        "languages": _shares(found.tally.languages, total),
        "common_language": found.common_language,
        "balance": _balance(found),
        "groups": found.answers.report(),
        "evaluations": _evaluations(found),
        "seconds": found.seconds,
    }


def _findings(found: Diagnosis) -> list[dict[str, Any]]:
    by_severity = sorted(ALL, key=lambda kind: SEVERITIES.index(kind.severity))
    entries = [_finding(found, kind) for kind in by_severity]
    return [entry for entry in entries if entry["count"]]


def _finding(found: Diagnosis, kind: Kind) -> dict[str, Any]:
    rows = found.having(kind.name)
    most = found.settings.kept_lines
    lines: dict[str, list[int]] = {}
    counts: dict[str, int] = {}
    for number, item in enumerate(found.settings.inputs):
        start, end = np.searchsorted(rows, found.starts[number : number + 2])
        mine = rows[start:end] - found.starts[number]
        if len(mine):
            counts[item.name] = len(mine)
            lines[item.name] = [found.rows[number].line(int(row)) for row in mine[:most]]
    return {
        "kind": kind.name,
        "severity": kind.severity,
        "about": kind.about,
        "count": len(rows),
        "share": round(len(rows) / max(len(found.flags), 1), 6),
        "counts": counts,
        "lines": lines,
        "lines_complete": all(counts[name] <= most for name in counts),
        "fix": kind.fix,
        "examples": [
            {"where": found.where(shown.row), "detail": shown.detail, "text": shown.text}
            for shown in found.examples.get(kind.name, ())
        ],
    }


def _lengths(found: Diagnosis, number: int) -> dict[str, Any]:
    part = slice(int(found.starts[number]), int(found.starts[number + 1]))
    out = {"characters": lengths.describe(found.characters[part])}
    tokens = found.tokens[part]
    tokens = tokens[tokens > 0]
    if len(tokens):
        out["tokens"] = lengths.describe(tokens)
        targets = found.targets[part]
        out["targets"] = lengths.describe(targets[targets > 0])
        if found.settings.seq_len is not None:
            seq_len = found.settings.seq_len
            documents = found.settings.inputs[number].format == "text"
            rows = lengths.windows(tokens, seq_len) if documents else tokens
            out["fit"] = lengths.fit(rows, seq_len)
    return out


def _shares(counts: Mapping[str, int], total: int, top: int = _TOP) -> list[dict[str, Any]]:
    return [
        {"value": value, "count": count, "share": round(count / max(total, 1), 6)}
        for value, count in ranked(counts)[:top]
    ]


def _balance(found: Diagnosis) -> dict[str, Any]:
    tally, total = found.tally, len(found.flags)
    labels: dict[str, Any] | None = None
    answered = sum(tally.labels.values())
    few = len(tally.labels) <= min(_MOST_LABELS, answered // _ROWS_A_LABEL)
    if answered and few and tally.long_answers <= answered // 10:
        counts = np.array(list(tally.labels.values()), np.float64)
        share = counts / counts.sum()
        entropy = float(-(share * np.log(share)).sum())
        labels = {
            "different": len(counts),
            "evenness": round(entropy / np.log(len(counts)), 4) if len(counts) > 1 else 1.0,
            "largest_share": round(float(share.max()), 4),
            "top": _shares(tally.labels, answered),
        }
    low, high = (share * total for share in _TERM_SHARE)
    terms = {
        word: count
        for word, count in tally.terms.items()
        if max(low, 2) <= count <= high and len(word) > 3 and not word.isdigit()
    }
    return {
        "labels": labels,
        "openings": [entry for entry in _shares(tally.openings, total) if entry["count"] > 1],
        "fields": {
            name: _shares(counts, total)
            for name, counts in tally.fields.items()
            if 1 <= len(counts) <= min(_MOST_LABELS, max(2, sum(counts.values()) // 2))
        },
        "terms": _shares(terms, total, 40),
        "topics": topics(found.samples, [word for word, _ in ranked(terms)]),
        "rare_values_dropped": sorted(tally.pruned),
    }


def _evaluations(found: Diagnosis) -> list[dict[str, Any]]:
    if found.index is None:
        return []
    sizes = np.bincount(found.index.set_of, minlength=len(found.index.names))
    return [
        {"name": item.name, "source": item.source, "field": item.field, "items": int(size)}
        for item, size in zip(found.settings.evaluations, sizes, strict=True)
    ]


def failed(report: Mapping[str, Any], kinds: frozenset[str]) -> list[str]:
    """Returns the kinds among `kinds` of which the report has a row."""
    return [entry["kind"] for entry in report["findings"] if entry["kind"] in kinds]


def write(path: str | os.PathLike[str], text: str) -> None:
    """Writes a file aside and moves it into place."""
    target = Path(path)
    aside = target.with_name(f".{target.name}.part")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, target)


def as_json(report: Mapping[str, Any]) -> str:
    """Returns the report as JSON text."""
    return json.dumps(report, ensure_ascii=False, indent=1) + "\n"


def summary(report: Mapping[str, Any]) -> list[str]:
    """Returns the report as lines for a terminal."""
    total = report["rows"]
    lines = [
        f"{total:,} rows in {len(report['inputs'])} source(s); "
        f"{report['rows_without_finding']:,} without a finding"
    ]
    for entry in report["findings"]:
        places = [
            f"{without_directories(e['where'])} ({without_directories(e['detail'])})"
            for e in entry["examples"][:2]
        ]
        lines.append(
            f"{entry['severity']:8}{entry['kind']:22}{entry['count']:>9,} {entry['share']:7.2%}  "
            + "; ".join(places)
        )
    for name, found in report["lengths"].items():
        unit = "tokens" if "tokens" in found else "characters"
        figures = found[unit]
        if not figures["count"]:
            continue
        at = figures["percentiles"]
        line = (
            f"{name}: {unit} a row: median {at['50']:,}, 95 % {at['95']:,}, most {figures['max']:,}"
        )
        if "fit" in found:
            fit = found["fit"]
            line += (
                f"; at seq_len {fit['seq_len']:,} {fit['overlong']:,} rows are cut, padding is "
                f"{fit['padding_share']:.1%}, packed rows are {fit['packing_efficiency']:.1%} full"
            )
        lines.append(line)
    spoken = [
        f"{e['value']} {e['share']:.1%}" for e in report["languages"][:5] if e["value"] != UNKNOWN
    ]
    if spoken:
        lines.append("languages: " + ", ".join(spoken))
    return lines
