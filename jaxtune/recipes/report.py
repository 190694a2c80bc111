"""`report.html` of a run: what its workdir says, on one page that needs no network."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxtune.core import page as html
from jaxtune.core.page import Markup, element, text
from jaxtune.recipes import report_data, showcase
from jaxtune.recipes import workdir as files
from jaxtune.training.workdir import metrics_file, read_json, write_whole

REPORT = "report.html"
# Metrics with a section of their own, or of no interest as a curve.
APART = ("step", "learning_rate", "tokens_per_second", "step_seconds", "tokens", "trained_tokens")
POINTS = 400  # the most of a curve; more are thinned out
SAMPLES = 6  # rows of samples.jsonl that are shown, the latest

Rows = Sequence[Mapping[str, Any]]


def write_report(workdir: Path) -> Path:
    """Writes the report of a run beside its other files, and returns its path.

    Raises:
        RequestError: a file of the run is damaged.
    """
    path = workdir / REPORT
    write_whole(path, report(workdir))
    return path


def report(workdir: Path) -> str:
    """Returns the report of a run as HTML; what the workdir does not hold is left out."""
    config = read_json(workdir / files.CONFIG)
    summary = read_json(workdir / files.SUMMARY) if (workdir / files.SUMMARY).is_file() else {}
    rows = metrics_file(workdir / files.METRICS).rows()
    parts = [
        head(config, summary),
        *section("Loss", curves(rows, ["loss", "eval/loss"])),
        *section("Other metrics", others(rows)),
        *section("What is retained", retained(rows)),
        *section("Learning rate", curves(rows, ["learning_rate"])),
        *section("Throughput", curves(rows, ["tokens_per_second"])),
        *section("Memory", memory(summary)),
        *section("Before and after", side_by_side(workdir)),
        *section("Samples", sampled(workdir)),
        *section("Data", report_data.data(workdir, config, summary)),
        *section("Cost", cost(summary)),
        *section("Fingerprints", fingerprints(summary)),
        *section("Again", again(workdir, config)),
    ]
    return html.page(f"{config['objective']['name']}: {workdir.name}", *parts)


def section(title: str, content: Markup | None) -> list[Markup]:
    """Returns a heading and what is below it; nothing where there is nothing."""
    return [] if content is None else [html.heading(title), content]


def head(config: Mapping[str, Any], summary: Mapping[str, Any]) -> Markup:
    """Returns what was trained on what, and how it ended."""
    counts = summary.get("parameters", {})
    model = config["model"].get("path") or config["model"].get("preset")
    sources = ", ".join(entry["source"] for entry in config["data"]["train"])
    figures = [
        ("stop reason", str(summary.get("stop_reason", "not ended"))),
        ("steps", f"{summary.get('step', 0):,} of {summary.get('total_steps', 0):,}"),
        ("tokens", f"{summary.get('tokens', 0):,}"),
        ("trained parameters", f"{counts.get('trainable', 0):,}"),
        ("of all", f"{counts.get('total', 0):,}"),
    ]
    metrics = summary.get("metrics", {})
    for name in ("loss", "eval/loss", "eval/accuracy", "eval/reward", "retention/nll_rise"):
        if isinstance(metrics.get(name), int | float):
            figures.append((name, f"{metrics[name]:.4g}"))
    old = ", ".join(entry["source"] for entry in config.get("retention", {}).get("replay_data", ()))
    beside = f", replaying {old}" if old else ""
    words = f"{config['peft']['method']} on {model}, trained on {sources}{beside}."
    detail = summary.get("detail") or summary.get("error")
    told = [html.cards(figures), html.paragraph(words)]
    return html.join(told + ([html.paragraph(str(detail))] if detail else []))


def series(rows: Rows, name: str) -> tuple[list[float], list[float]]:
    """Returns (steps, values) of a metric, at most POINTS of them, the last among them."""
    known = [(row["step"], row[name]) for row in rows if isinstance(row.get(name), int | float)]
    stride = -(-len(known) // POINTS) or 1
    kept = known[::-stride][::-1]
    return [step for step, _ in kept], [value for _, value in kept]


def curves(rows: Rows, names: Sequence[str]) -> Markup | None:
    """Returns metrics as curves on common axes; None without two points of any."""
    found = [(name, *series(rows, name)) for name in names]
    found = [curve for curve in found if len(curve[1]) > 1]
    if not found:
        return None
    label = ", ".join(name for name, *_ in found) + " by step"
    return html.join([html.lines(found, label), html.paragraph(label, soft=True)])


def others(rows: Rows) -> Markup | None:
    """Returns every further metric as a small curve, folded away; evaluation beside training."""
    names = dict.fromkeys(name for row in rows for name in row)
    shown = {"loss", "eval/loss", *APART}
    parts = []
    for name in names:
        if name in shown or name.startswith(("retention/", "eval/")):
            continue
        pair = [name, f"eval/{name}"]
        shown |= set(pair)
        drawn = curves(rows, pair)
        if drawn is not None:
            parts.append(html.folded(element("b", text(name)), drawn))
    for name in names:
        if name.startswith("eval/") and name not in shown:
            drawn = curves(rows, [name])
            if drawn is not None:
                parts.append(html.folded(element("b", text(name)), drawn))
    return html.join(parts) if parts else None


def retained(rows: Rows) -> Markup | None:
    """Returns the loss on what is retained, and the way between target and retention."""
    parts = [drawn for drawn in [curves(rows, ["retention/nll"])] if drawn is not None]
    points = [
        (row["eval/loss"], row["retention/nll"])
        for row in rows
        if isinstance(row.get("eval/loss"), float) and isinstance(row.get("retention/nll"), float)
    ]
    if len(points) > 1:
        ordered = sorted(points)
        curve = ("retention/nll", [x for x, _ in ordered], [y for _, y in ordered])
        parts.append(html.lines([curve], "retention/nll by eval/loss"))
        parts.append(html.paragraph("retention/nll by eval/loss of each evaluation", soft=True))
    return html.join(parts) if parts else None


def side_by_side(workdir: Path) -> Markup | None:
    """Returns completions before and after training, beside what the data has."""
    found = showcase.read(workdir)
    if not found:
        return None
    rows = [
        (item["prompt"], item.get("before", ""), item.get("after", ""), item["wanted"])
        for item in found
    ]
    return html.table(("prompt", "before", "after", "in the data"), rows)


def sampled(workdir: Path) -> Markup | None:
    """Returns the latest rows of `samples.jsonl`."""
    path = workdir / files.SAMPLES
    rows = metrics_file(path).rows()[-SAMPLES:] if path.is_file() else []
    if not rows:
        return None
    cells = [
        (row["step"], row.get("prompt", ""), row.get("completion", ""), row.get("reward", ""))
        for row in rows
    ]
    return html.table(("step", "prompt", "completion", "reward"), cells, numbers=(0, 3))


def memory(summary: Mapping[str, Any]) -> Markup | None:
    """Returns the most memory that the run has used."""
    peak = summary.get("memory")
    if not peak:
        return None
    known = [("fullest device", peak["device_bytes"]), ("host process", peak["host_bytes"])]
    cells = [(name, f"{size / 2**30:,.2f} GiB") for name, size in known if size is not None]
    note = "The most that was in use at any time since the process began."
    return html.join(
        [html.table(("", "at most"), cells, numbers=(1,)), html.paragraph(note, soft=True)]
    )


def cost(summary: Mapping[str, Any]) -> Markup | None:
    """Returns time, machines and money."""
    spent = summary.get("cost")
    if not spent:
        return None
    rows = [
        ("training time", f"{summary['wall_seconds']:,.1f} s"),
        ("devices", f"{summary['devices']} × {spent['device']} ({summary['platform']})"),
        ("device hours", f"{spent['device_hours']:,.4g}"),
    ]
    if spent["usd"] is not None:
        price = f"{spent['usd_per_device_hour']:g} an hour of a device, {spent['price_source']}"
        rows.append(("US dollars", f"{spent['usd']:,.2f} ({price})"))
    return html.table(("", ""), [*rows, *summary.get("versions", {}).items()])


def fingerprints(summary: Mapping[str, Any]) -> Markup | None:
    """Returns every fingerprint of the run."""
    known = {**summary.get("fingerprints", {}), "code": summary.get("code")}
    rows = [(name, element("code", text(value))) for name, value in known.items() if value]
    return html.table(("of", "digest"), rows) if rows else None


def again(workdir: Path, config: Mapping[str, Any]) -> Markup:
    """Returns how to make the run again, with its whole config."""
    saved = workdir / files.CONFIG
    command = f"jaxtune train --config={shlex.quote(str(saved))} --workdir=NEW_DIR"
    whole = element("pre", text(json.dumps(config, indent=1, ensure_ascii=False)))
    folded = html.folded(element("b", text("config.json")), whole)
    return html.join([element("pre", text(command)), folded])


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
        *section("Curves", html.lines(drawn, "curves of all trials") if drawn else None),
    ]
    path = workdir / REPORT
    write_whole(path, html.page(f"Sweep: {workdir.name}", *parts))
    return path


def coordinates(rows: Sequence[Any], keys: Sequence[str], metric: str) -> Markup | None:
    """Returns the trials as lines over one axis for each key and one for the metric."""
    known = [row for row in rows if row.metric is not None]
    if len(known) < 2 or not keys:
        return None
    axes = [(key, [row.overrides.get(key) for row in known]) for key in keys]
    axes.append((metric, [row.metric for row in known]))
    return html.parallel([(name, places(values)) for name, values in axes], "settings and result")


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
    return [(float(at(v)), f"{v:g}" if isinstance(v, float) else str(v)) for v in values]
