"""`jaxtune eval`: loss and perplexity of a model or run on data, and tasks."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from typing import Any

from jaxtune.cli import arguments
from jaxtune.core.errors import RequestError


def run(argv: Sequence[str]) -> int:
    """Runs the verb and returns its exit code."""
    parser = arguments.Parser(
        "eval",
        "Measures loss and perplexity of a model on data, or runs tasks of lm-evaluation-harness.",
        """jaxtune eval --model=runs/first --data=jsonl:FILE --format=chat --json
           jaxtune eval --workdir=runs/first
           jaxtune eval --model=runs/first --data=jsonl:FILE --format=chat --against=base
           jaxtune eval --model=MODEL_DIR --tasks=arc_easy --limit=100 --json""",
    )
    arguments.add_source(parser)
    parser.add_argument("--data", metavar="SOURCE", help="jsonl:PATH, text:PATH or tfds:NAME:SPLIT")
    parser.add_argument("--format", metavar="FORMAT", help="what a record of --data holds")
    parser.add_argument("--seq_len", type=arguments.positive, help="tokens in a row")
    parser.add_argument("--batch_size", type=arguments.positive, help="sequences at a time")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="of the computation")
    parser.add_argument(
        "--against",
        metavar="DIR|base",
        help="another model, or the run's own base: the rise of the loss, with its interval",
    )
    parser.add_argument("--tasks", metavar="NAME,…", help="tasks of lm-evaluation-harness")
    parser.add_argument("--include_path", metavar="DIR", help="directory of more tasks")
    parser.add_argument("--limit", type=arguments.positive, help="examples of each source or task")
    arguments.add_distributed(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    split = arguments.split(argv)
    args = parser.parse(split.rest)
    options = _options(args, split.config)

    from jaxtune.parallel import processes

    processes.join(args.distributed)

    if split.config is None:
        result = _evaluate(options)
    else:
        from jaxtune.cli import config_file

        loaded = config_file.load(split.config, split.overrides)
        config = loaded.resolve()
        with loaded.located():
            result = _evaluate({**options, "config": config})
    if not processes.is_writer():
        return 0
    if args.json:
        from jaxtune.training.workdir import plain

        print(json.dumps(plain(result)))  # JSON has no infinity
    else:
        _show(result)
    return 0


def _options(args: argparse.Namespace, config: str | None) -> dict[str, Any]:
    """Returns the keyword arguments that were given; refuses combinations without a meaning."""
    given = {
        name: value
        for name, value in vars(args).items()
        if value is not None and name not in ("config", "json", "distributed")
    }
    if args.model is not None and (config is not None or args.workdir is not None):
        raise RequestError("takes the place of --config and --workdir: give one", key="--model")
    if args.model is None and config is None and args.workdir is None:
        raise RequestError(
            "give --model=DIR, --workdir=DIR or --config=FILE (see jaxtune eval --help)"
        )
    if args.adapter is not None and args.model is None:
        raise RequestError("needs --model=DIR, its base", key="--adapter")
    if (args.data is None) != (args.format is None):
        missing, present = ("--format", "--data") if args.format is None else ("--data", "--format")
        raise RequestError(f"needs {missing}", key=present)
    if args.model is not None and args.data is None and args.tasks is None:
        raise RequestError("needs --data=SOURCE --format=FORMAT, or --tasks=NAME", key="--model")
    if args.include_path is not None and args.tasks is None:
        raise RequestError("needs --tasks=NAME", key="--include_path")
    if args.against is not None and args.tasks is not None and args.data is None:
        raise RequestError("compares losses: give --data=SOURCE", key="--against")
    if args.data is not None:
        from jaxtune.recipes.schema_keys import EVAL_ENTRY
        from jaxtune.recipes.schema_values import check

        source, format_, _ = EVAL_ENTRY
        check(source, args.data, "--data")
        check(format_, args.format, "--format")
    if args.tasks is not None:
        given["tasks"] = tuple(filter(None, args.tasks.split(",")))
    return given


def _evaluate(options: dict[str, Any]) -> Mapping[str, Any]:
    from jaxtune.recipes import evaluate

    return evaluate.evaluate(**options)


def _show(result: Mapping[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("", "", show_header=False)
    for name, value in result.items():
        if isinstance(value, Mapping):
            for inner, metrics in value.items():
                shown = metrics if isinstance(metrics, Mapping) else {"": metrics}
                for metric, number in shown.items():
                    table.add_row(f"{name}: {inner} {metric}".rstrip(), _number(number))
        else:
            table.add_row(name, _number(value))
    Console().print(table)


def _number(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
