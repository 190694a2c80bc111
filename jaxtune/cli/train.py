"""`jaxtune train`: runs or continues the run in the workdir."""

from __future__ import annotations

import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from jaxtune.cli import arguments
from jaxtune.core.errors import RequestError

SUMMARY = "summary.json"
DONE = ("finished", "budget")  # stop reasons that are a success


def run(argv: Sequence[str]) -> int:
    """Runs the verb and returns its exit code."""
    parser = arguments.Parser(
        "train",
        "Runs the config's objective in the workdir; the same command again continues it exactly.",
        """jaxtune train --config=configs/sft_lora.py:dora --config.model.path=MODEL_DIR \\
             '--config.data.train[0].source=jsonl:FILE' --workdir=runs/first""",
    )
    parser.add_argument("--config", metavar="FILE[:ARG]", help=arguments.CONFIG_HELP)
    parser.add_argument("--workdir", metavar="DIR", help="directory that the run lives in")
    parser.add_argument(
        "--dry_run", action="store_true", help="everything but training: data, shapes, one compile"
    )
    parser.add_argument(
        "--allow_change",
        action="store_true",
        help="continue although config, data, tokenizer or base changed",
    )
    arguments.add_distributed(parser)
    parser.add_argument(
        "--budget",
        metavar="USD|HOURS",
        help="stop once so much is spent on training: 20USD, 3h, 90min; a larger one continues",
    )
    parser.add_argument(
        "--price",
        metavar="USD|FILE",
        help="dollars an hour of one device, for --budget and the report",
    )
    parser.add_argument("--json", action="store_true", help="print the summary as one JSON object")
    split = arguments.split(argv)
    args = parser.parse(split.rest)
    if split.config is None:
        raise RequestError("--config=FILE is missing (see jaxtune train --help)")
    workdir = (
        None
        if args.dry_run and args.workdir is None
        else arguments.require_workdir(args.workdir, remote=True)
    )

    from jaxtune.parallel import processes

    processes.join(args.distributed)

    from jaxtune.cli import config_file

    loaded = config_file.load(split.config, split.overrides)
    config = loaded.resolve()

    from rich.console import Console

    console = Console(stderr=args.json) if processes.is_writer() else None
    with loaded.located():
        if args.dry_run:
            from jaxtune.recipes import dry_run

            report = dry_run.dry_run(config, console)
            if args.json and processes.is_writer():
                print(json.dumps(report))
            return 0
        from jaxtune.recipes import train

        result = train.train(
            config,
            workdir,
            allow_change=args.allow_change,
            budget=args.budget,
            price=args.price,
            console=console,
        )
    if args.json and processes.is_writer():
        from jaxtune.training.workdir import plain

        print(json.dumps(plain(result.summary)))
    code = exit_code(result.summary)
    if code and processes.is_writer():
        tell(result.summary, workdir)
    return code


def tell(summary: dict[str, Any], workdir: pathlib.Path) -> None:
    """Says on standard error why a run stopped before its end, and where more is written."""
    reason = summary["stop_reason"]
    detail = summary.get("detail") or f"at step {summary.get('step')}"
    print(f"jaxtune: stopped, {reason}: {detail}; see {workdir / SUMMARY}", file=sys.stderr)


def exit_code(summary: dict[str, Any]) -> int:
    """0 for a run that did what was asked, 1 for one that stopped before."""
    return 0 if summary.get("stop_reason") in DONE else 1
