"""`jaxtune data replay`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from jaxtune.cli import arguments
from jaxtune.core.errors import RequestError


def run(argv: Sequence[str]) -> int:
    """Writes what a model writes by itself and returns the exit code."""
    parser = arguments.Parser(
        "data replay",
        "Writes samples of a model, as data of format tokens: to mix in, or to be retained.",
        """jaxtune data replay --model=MODEL_DIR --num=1000 --max_new_tokens=256 --out=own.jsonl
           jaxtune data replay --model=MODEL_DIR --source=jsonl:FILE --format=chat \\
             --out=answers.jsonl""",
    )
    parser.add_argument("--model", metavar="DIR", help="the base: a model or a run")
    parser.add_argument("--out", metavar="FILE.jsonl", help="FILE.jsonl.meta.json stands beside it")
    parser.add_argument(
        "--num", type=arguments.positive, help="samples (one of each record of --source)"
    )
    parser.add_argument("--source", metavar="SOURCE", help="what samples begin with (BOS)")
    parser.add_argument("--format", metavar="FORMAT", help="what a record of it holds")
    parser.add_argument(
        "--first_tokens",
        type=arguments.positive,
        help="of a text, so many tokens to begin with; of other records, all before the answer (8)",
    )
    arguments.add_sampling(parser, max_new_tokens=256, temperature=1.0)
    parser.add_argument("--batch_size", type=arguments.positive, default=64, help="at a time (64)")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--quantize", choices=("none", "int8", "nf4"), help="the model's kernels")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse(argv)
    for name in ("model", "out"):
        if getattr(args, name) is None:
            raise RequestError("is missing", key=f"--{name}")
    sampling = arguments.sampling(args)

    from rich.console import Console

    from jaxtune.recipes.retention.replay import write_replay

    others = ("json", *arguments.SAMPLING)
    options = {name: value for name, value in vars(args).items() if name not in others}
    report = write_replay(**options, **sampling, console=Console(file=sys.stderr))
    if args.json:
        print(json.dumps(report))
    else:
        print(
            f"written to {args.out}: {report['num']:,} samples, {report['new_tokens']:,} tokens of "
            f"the model's own, {100 * report['ended'] / report['num']:.0f} % ended by themselves, "
            f"the longest {report['longest']} tokens"
        )
    return 0
