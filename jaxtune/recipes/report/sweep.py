"""`report.html` of a sweep: its trials ranked, over parallel axes, and their curves."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from jaxtune.core import page as html
from jaxtune.core.page import Markup
from jaxtune.recipes import workdir as files
from jaxtune.recipes.report.page import REPORT, section, series
from jaxtune.training.workdir import metrics_file, write_whole


def write_sweep(workdir: Path, ranked: Iterable[Any], metric: str) -> Path:
    """Writes `report.html` of a sweep: ranking, parallel coordinates, curves overlaid.

    Args:
        workdir: of the sweep.
        ranked: the `sweep.Row`s, best first.
        metric: that ranks.
    """
    rows = list(ranked)
    keys = list(dict.fromkeys(key for row in rows for key in row.overrides))
    cells = [
        (
            number,
            "" if row.metric is None else f"{row.metric:.5g}",
            *(str(row.overrides.get(key, "")) for key in keys),
            row.status,
            Path(row.trial).name,
        )
        for number, row in enumerate(rows, 1)
    ]
    table = html.table(("", metric, *keys, "status", "trial"), cells, numbers=(0, 1))
    drawn = []
    for row in rows:
        path = workdir / row.trial / files.METRICS
        found = series(metrics_file(path).rows(), metric) if path.is_file() else ([], [])
        if len(found[0]) < 2 and path.is_file():
            found = series(metrics_file(path).rows(), "loss")
        if len(found[0]) > 1:
            drawn.append((Path(row.trial).name, *found))
    parts = [
        *section("Ranking", table),
        *section("Settings and result", coordinates(rows, keys, metric)),
        *section("Curves", overlaid(drawn)),
    ]
    path = workdir / REPORT
    write_whole(path, html.page(f"Sweep: {workdir.name}", *parts))
    return path


def overlaid(drawn: Sequence[tuple[str, Sequence[float], Sequence[float]]]) -> Markup | None:
    """Returns the curves (trial, steps, values) over each other, best first."""
    if not drawn:
        return None
    names = [name for name, *_ in drawn]
    return html.join([html.lines(drawn, "curves of all trials"), html.legend(names)])


def coordinates(rows: Sequence[Any], keys: Sequence[str], metric: str) -> Markup | None:
    """Returns the trials as lines over one axis for each key and one for the metric."""
    known = [row for row in rows if row.metric is not None]
    if len(known) < 2 or not keys:
        return None
    axes = [(key, [row.overrides.get(key) for row in known]) for key in keys]
    axes.append((metric, [row.metric for row in known]))
    drawn = html.parallel([(name, places(values)) for name, values in axes], "settings and result")
    note = "A line for each trial; the best one is drawn strong."
    return html.join([drawn, html.paragraph(note, soft=True)])


def places(values: Sequence[Any]) -> list[tuple[float, str]]:
    """Returns (place in 0..1, label) of each value: numbers by size, others by kind.

    >>> places([1, 3, 2])
    [(0.0, '1'), (1.0, '3'), (0.5, '2')]
    >>> places(["b", "a", "b"])
    [(1.0, 'b'), (0.0, 'a'), (1.0, 'b')]
    """
    numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
    kinds = sorted(set(values)) if numbers else sorted({str(v) for v in values})
    low, span = (kinds[0], (kinds[-1] - kinds[0]) or 1) if numbers else (0, (len(kinds) - 1) or 1)
    at = (lambda v: (v - low) / span) if numbers else (lambda v: kinds.index(str(v)) / span)
    return [(float(at(v)), f"{v:.4g}" if isinstance(v, float) else str(v)) for v in values]
