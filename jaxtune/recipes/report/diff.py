"""`jaxtune diff`: what differs between two runs, in config, data, code and results."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxtune.core.errors import RequestError
from jaxtune.core.places import place
from jaxtune.recipes import workdir as files
from jaxtune.recipes.schema.resolve import changes
from jaxtune.training.workdir import metrics_file, read_json

# Of the summary, what says how a run went rather than what it is.
RESULTS = ("stop_reason", "step", "tokens", "trained_tokens", "wall_seconds")
CODE = ("code", "versions", "platform", "devices")


def diff(one: str | Path, two: str | Path) -> dict[str, list[dict[str, Any]]]:
    """Returns the differences of two runs by section, each a list of {"key", "a", "b"}.

    Sections are "config", "data" (fingerprints of base, data, tokenizer and what is retained),
    "code" (jaxtune's own source, versions of packages, devices), and "results": every metric that
    both or one of them logged last, equal ones too, with "change" = b − a where both are numbers.

    Args:
        one, two: workdirs; a run that has not ended has no summary, and shows the rest.

    Raises:
        RequestError: a directory that holds no run, or a damaged file.
    """
    a, b = (read_run(place(path, "RUN")) for path in (one, two))
    return {
        "config": [{"key": k, "a": x, "b": y} for k, x, y in changes(a["config"], b["config"])],
        "data": differing(a["fingerprints"], b["fingerprints"]),
        "code": differing(chosen(a["summary"], CODE), chosen(b["summary"], CODE)),
        "results": results(a, b),
    }


def read_run(workdir: Path) -> dict[str, Any]:
    """Returns {"config", "summary", "fingerprints", "metrics"} of a workdir."""
    if not (workdir / files.CONFIG).is_file():
        raise RequestError(f"holds no run: there is no {files.CONFIG}", key="RUN", where=workdir)
    config = read_json(workdir / files.CONFIG)
    if "objective" not in config:
        raise RequestError(f"its {files.CONFIG} is not that of a run", key="RUN", where=workdir)
    path = workdir / files.SUMMARY
    summary = read_json(path) if path.is_file() else {}
    rows = metrics_file(workdir / files.METRICS).rows()
    return {
        "config": config,
        "summary": summary,
        "fingerprints": files.digests(workdir, summary),
        "metrics": files.last_metrics(rows),
    }


def chosen(summary: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """Returns the named entries of a summary, mappings spread out."""
    out: dict[str, Any] = {}
    for name in names:
        value = summary.get(name)
        out |= value if isinstance(value, Mapping) else {name: value}
    return out


def differing(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns {"key", "a", "b"} of the entries that are not equal."""
    names = dict.fromkeys([*a, *b])
    return [{"key": n, "a": a.get(n), "b": b.get(n)} for n in names if a.get(n) != b.get(n)]


def results(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns {"key", "a", "b", "change"} of how two runs went."""
    left, right = (chosen(run["summary"], RESULTS) | run["metrics"] for run in (a, b))
    rows = []
    for name in dict.fromkeys([*left, *right]):
        x, y = left.get(name), right.get(name)
        numbers = isinstance(x, int | float) and isinstance(y, int | float)
        rows.append({"key": name, "a": x, "b": y, "change": y - x if numbers else None})
    return rows
