# ruff: noqa: E501 (a table of Markdown)
"""Writes the figures of docs/plan.md by running the commands on it: `make plan-page`.

Needs libtpu (`pip install "jax[tpu]"`) and some minutes; no TPU.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGE = Path(__file__).with_name("plan.md")
GIB = 2**30
AT_ONCE = 2
# The example, whose output is shown; and the compiled runs: name, config, preset, tokens of a row,
# rows, topology.
EXAMPLE = re.compile(r"(    jaxtune plan .*--devices=16xv5e\n\n)((?:    .*\n)+)")
RUNS = (
    ("8B, LoRA", "sft_lora", "llama3.1-8b", 8192, 16, "v5e:4x4"),
    ("8B, full", "sft_full", "llama3.1-8b", 8192, 16, "v5p:2x2x4"),
    ("70B, LoRA", "sft_lora", "llama3.1-70b", 8192, 64, "v5p:4x4x4"),
    ("70B, LoRA", "sft_lora", "llama3.1-70b", 4096, 256, "v5e:16x16"),
    ("30B-A3B, LoRA", "sft_lora", "qwen3-30b-a3b", 8192, 16, "v5p:2x2x4"),
    ("Gemma 2 9B, LoRA", "sft_lora", "gemma2-9b", 8192, 16, "v5e:4x4"),
)
HEAD = """| run | slice | tokens | weights, trainables, optimizer | estimated | compiled | fits | sent a step |
|---|---|---|---|---|---|---|---|
"""


def main() -> None:
    """Runs everything and writes the page."""
    text = PAGE.read_text(encoding="utf-8")
    command = EXAMPLE.search(text)[1]
    shown = run(shlex.split(command.replace("\\\n", " "))[1:])
    block = "".join(f"    {line.rstrip()}\n" for line in shown.rstrip().splitlines())
    text = EXAMPLE.sub(lambda match: match[1] + block, text)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        rows = "".join(pool.map(lambda one: row(*one), RUNS))
    text = re.sub(r"\| run \| slice .*\n(\|.*\n)+", lambda _: HEAD + rows, text)
    PAGE.write_text(text, encoding="utf-8")


def run(arguments: list[str]) -> str:
    """Returns what `jaxtune` prints."""
    command = [sys.executable, "-m", "jaxtune.cli.main", *arguments]
    return subprocess.run(command, check=True, cwd=ROOT, capture_output=True, text=True).stdout


def row(name: str, config: str, preset: str, tokens: int, rows: int, topology: str) -> str:
    """Returns a line of the table: one row of tokens a chip."""
    plan: dict[str, Any] = json.loads(
        run(
            [
                "plan",
                f"--config=configs/{config}.py",
                f"--config.model.preset={preset}",
                "--config.model.remat=block",
                f"--config.data.seq_len={tokens}",
                f"--config.batch_size={rows}",
                f"--topology={topology}",
                "--json",
            ]
        )
    )
    sizes, compiled = plan["bytes_per_device"], plan["compiled"]
    resident = sum(sizes[part] for part in ("weights", "trainable", "optimizer"))
    sent = sum(kind["bytes"] for kind in (compiled["collectives"] or {}).values())
    off = sizes["total"] / compiled["total_bytes"] - 1
    cells = (
        name,
        topology,
        f"{tokens:,}",
        f"{resident / GIB:.2f} GiB",
        f"{sizes['total'] / GIB:.2f} GiB ({off:+.0%})",
        f"{compiled['total_bytes'] / GIB:.2f} GiB",
        f"{'yes' if plan['fits'] else 'no'}, {abs(plan['headroom_bytes']) / GIB:.1f} GiB "
        f"{'free' if plan['headroom_bytes'] >= 0 else 'too much'}",
        f"{sent / GIB:.0f} GiB",
    )
    return f"| {' | '.join(cells)} |\n"


if __name__ == "__main__":
    main()
