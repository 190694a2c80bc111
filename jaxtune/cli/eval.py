"""`jaxtune eval`: loss and perplexity of a model or run on data, its answers, and tasks."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jaxtune.cli import arguments
from jaxtune.core.errors import RequestError

# What a figure with its interval holds; with "rise", the interval is that of the rise.
FIGURES = ({"value", "low", "high"}, {"value", "rise", "low", "high"})


def run(argv: Sequence[str]) -> int:
    """Runs the verb and returns its exit code."""
    parser = arguments.Parser(
        "eval",
        "Measures loss and perplexity of a model on data, and with --metrics or --labels what it "
        "answers; or runs tasks of lm-evaluation-harness.",
        """jaxtune eval --model=runs/first --data=jsonl:FILE --format=chat --json
           jaxtune eval --workdir=runs/first
           jaxtune eval --model=runs/first --data=jsonl:FILE --format=chat --against=base
           jaxtune eval --model=runs/first --data=jsonl:FILE --format=chat --metrics=exact_match,f1
           jaxtune eval --model=runs/first --data=jsonl:FILE --format=completion --labels=auto
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
        help="another model, or the run's own base: the rise of each figure, with its interval",
    )
    parser.add_argument(
        "--metrics",
        metavar="NAME,…",
        type=arguments.names,
        help="of what the model writes: exact_match, f1, bleu, chrf, rouge",
    )
    arguments.add_sampling(parser, max_new_tokens=256)
    parser.add_argument("--stop", action="append", help="a string that ends a text")
    parser.add_argument(
        "--labels",
        metavar="auto|NAME,…",
        type=arguments.names,
        help="completions to choose from, the likeliest counts; auto: all that the data has",
    )
    parser.add_argument(
        "--judge",
        metavar="URL",
        help="a server of OpenAI's protocol whose model grades the answers; with --against, it "
        "compares them in both orders",
    )
    parser.add_argument("--judge_model", metavar="NAME", help="as the server knows it")
    parser.add_argument("--judge_template", metavar="FILE", help="Jinja text of the request")
    parser.add_argument(
        "--by", metavar="FIELD", help="of the records: every figure for each of its values too"
    )
    parser.add_argument(
        "--tasks", metavar="NAME,…", type=arguments.names, help="tasks of lm-evaluation-harness"
    )
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
        if value is not None
        and name not in ("config", "json", "distributed", "tasks", *arguments.SAMPLING)
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
    writing = arguments.sampling(args)
    if writing and args.metrics is None and args.judge is None:
        raise RequestError("needs --metrics=NAME", key=f"--{next(iter(writing))}")
    for name in ("judge_model", "judge_template"):
        if getattr(args, name) is not None and args.judge is None:
            raise RequestError("needs --judge=URL", key=f"--{name}")
    for name in ("metrics", "labels", "by", "judge"):
        if getattr(args, name) is not None and args.tasks is not None and args.data is None:
            raise RequestError("needs --data=SOURCE", key=f"--{name}")
    if args.data is not None:
        from jaxtune.recipes.schema.keys import EVAL_ENTRY
        from jaxtune.recipes.schema.values import check

        source, format_, _ = EVAL_ENTRY
        check(source, args.data, "--data")
        check(format_, args.format, "--format")
    if args.tasks is not None:
        given["tasks"] = args.tasks
    return given | writing


def _evaluate(options: dict[str, Any]) -> Mapping[str, Any]:
    from jaxtune.recipes.evaluation import evaluate

    return evaluate.evaluate(**options)


def _show(result: Mapping[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("", "", show_header=False)
    for name, value in _flat(result):
        table.add_row(name, _number(value))
    Console().print(table)


def _flat(result: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """Yields a line each; a figure with its interval is one."""
    for name, value in result.items():
        shown = f"{before}{name}"
        if isinstance(value, Mapping) and set(value) in FIGURES:
            ends = f"[{_number(value['low'])}, {_number(value['high'])}]"
            rise = f", rise {_number(value['rise'])}" if "rise" in value else ""
            yield shown, f"{_number(value['value'])}{rise} {ends}"
        elif isinstance(value, Mapping):
            yield from _flat(value, f"{shown}: ")
        elif name == "confusion":
            continue  # by_label says it line by line
        else:
            yield shown, value


def _number(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
