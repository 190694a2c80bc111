"""`report.html` of a run: what its workdir says, on one page that needs no network."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxtune.core import page as html
from jaxtune.core.page import Markup, element, text
from jaxtune.recipes import workdir as files
from jaxtune.recipes.objectives import OBJECTIVES
from jaxtune.recipes.report import data as report_data
from jaxtune.recipes.report import showcase
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
        *section("Before and after", side_by_side(workdir, config)),
        *section("Samples", sampled(workdir)),
        *section("Data", report_data.data(workdir, config, summary)),
        *section("Cost", cost(summary)),
        *section("Fingerprints", fingerprints(workdir, summary)),
        *section("Again", again(workdir, config, summary)),
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
        ("parameters in all", f"{counts.get('total', 0):,}"),
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
    names = [name for name, *_ in found]
    label = ", ".join(names) + " by step"
    below = html.legend(names) if len(names) > 1 else html.paragraph(label, soft=True)
    return html.join([html.lines(found, label), below])


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
    """Returns what was kept and lost, its curves, and the way between target and retention."""
    names = [f"retention/{name}" for name in ("nll", "kl", "accuracy")]
    parts = [part for part in (kept(rows), *(curves(rows, [n]) for n in names)) if part is not None]
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


def kept(rows: Rows) -> Markup | None:
    """Returns each loss, KL and accuracy on what is retained, before and after, as a table."""
    known = [row for row in rows if any(name.startswith("retention/") for name in row)]
    if not known:
        return None
    first, last = known[0], known[-1]
    cells = []
    for name in last:
        if not name.startswith("retention/") or not name.endswith(("nll", "kl", "accuracy")):
            continue
        ends = [f"{name}_drop/{end}" for end in ("high", "low")]
        cells.append(
            (
                name.removeprefix("retention/"),
                *(f"{row[name]:.4g}" if name in row else "" for row in (first, last)),
                f"{last[name] - first[name]:+.4g}" if name in first else "",
                " to ".join(f"{0 - last[end]:+.4g}" for end in ends if end in last),
            )
        )
    header = ("", "before", "after", "change", "95 % interval")
    return html.table(header, cells, numbers=(1, 2, 3, 4))


def side_by_side(workdir: Path, config: Mapping[str, Any]) -> Markup | None:
    """Returns completions before and after training, beside what the data has."""
    found = showcase.read(workdir)
    if not found:
        if config["log"]["samples"] or not OBJECTIVES[config["objective"]["name"]].likelihood:
            return None
        return html.paragraph("--config.log.samples=4 shows what the model writes.", soft=True)
    parts = []
    for item in found:
        parts.append(html.paragraph(item["prompt"]))
        texts = [(when, item.get(when, "")) for when in ("before", "after")]
        parts.append(html.beside([*texts, ("in the data", item["wanted"])]))
    return html.join(parts)


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
    return html.table(("", ""), rows)


def fingerprints(workdir: Path, summary: Mapping[str, Any]) -> Markup | None:
    """Returns every fingerprint of the run."""
    known = files.digests(workdir, summary) | {"code": summary.get("code")}
    rows = [(name, element("code", text(value))) for name, value in known.items() if value]
    return html.table(("of", "digest"), rows) if rows else None


def again(workdir: Path, config: Mapping[str, Any], summary: Mapping[str, Any]) -> Markup:
    """Returns how to make the run again: command, versions of packages, and its whole config."""
    saved = workdir / files.CONFIG
    command = f"jaxtune train --config={shlex.quote(str(saved))} --workdir=NEW_DIR"
    whole = element("pre", text(json.dumps(config, indent=1, ensure_ascii=False)))
    folded = html.folded(element("b", text("config.json")), whole)
    packages = ", ".join(
        f"{name} {version}" for name, version in summary.get("versions", {}).items()
    )
    told = [html.paragraph(f"Made with {packages}.", soft=True)] if packages else []
    return html.join([element("pre", text(command)), *told, folded])
