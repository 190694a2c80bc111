"""`jaxtune train --dry_run`: everything but training; nothing is written."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from jaxtune.recipes.build import build
from jaxtune.recipes.plans.report import step_flops, work_of
from jaxtune.recipes.schema.resolve import resolve

ROWS_SHOWN = 2


def dry_run(config: Mapping[str, Any], console: Console | None = None) -> dict[str, Any]:
    """Checks a config down to its compiled step, without reading a weight or writing a file.

    Args:
        config: a ConfigDict or mapping.
        console: where data, first rows with their masks and sizes are shown; None shows nothing.

    Returns:
        {"parameters": {"total", "trainable"}, "steps", "tokens_per_step" (slots, padding
        included), "flops_per_step", "bytes_per_device": {"arguments", "temporary", "output",
        "total"}, "compile_seconds", "devices", "attention": {"name", "reason"}, "mesh": {axis:
        size}, "findings": what the mesh cannot do for the model (`parallel.findings.Finding`),
        "data", and "replay" where data are replayed}.

    Raises:
        RequestError: what the config asks for cannot be had.
    """
    plan = build(resolve(config))
    if console is not None:
        plan.objective.show(plan, ROWS_SHOWN, console)
    with jax.set_mesh(plan.mesh):
        lowered = plan.step.lower(*plan.abstract_arguments())
        started = time.perf_counter()
        compiled = lowered.compile()
        seconds = time.perf_counter() - started
    report = {
        "parameters": plan.parts.counts(),
        "steps": plan.data.budget.steps,
        "tokens_per_step": work_of(plan).batch_size * plan.config.data.seq_len,
        "flops_per_step": step_flops(plan),
        "bytes_per_device": memory(compiled.memory_analysis()),
        "compile_seconds": seconds,
        "devices": plan.mesh.size,
        "attention": dataclasses.asdict(plan.attention),
        "mesh": dict(plan.mesh.shape),
        "findings": [dataclasses.asdict(finding) for finding in plan.parts.findings],
        "data": plan.data.stream.stats(),
    }
    if plan.data.replay is not None:
        report["replay"] = plan.data.replay.stats()
    if console is not None:
        show(report, console)
        plan.show_findings(console)
    return report


def memory(stats: Any) -> dict[str, int]:
    """Returns bytes a device while a step runs, as XLA planned them.

    Args:
        stats: `compiled.memory_analysis()`. Donated arguments are counted once.
    """
    fresh = stats.output_size_in_bytes - stats.alias_size_in_bytes
    parts = {
        "arguments": stats.argument_size_in_bytes,
        "temporary": stats.temp_size_in_bytes,
        "output": fresh,
    }
    return parts | {"total": sum(parts.values())}


def show(report: Mapping[str, Any], console: Console) -> None:
    """Prints the report as a table."""
    table = Table("", "", show_header=False, box=None)
    for name, value in report.items():
        if name in ("data", "replay", "findings"):
            continue
        for key, number in value.items() if isinstance(value, Mapping) else (("", value),):
            label = f"{name} {key}".replace("_", " ").strip()
            if not isinstance(number, str):
                number = f"{number:.1f}" if isinstance(number, float) else f"{number:,}"
            table.add_row(label, number)
    console.print(table)
