"""`jaxtune data teacher`."""

from __future__ import annotations

import json
from collections.abc import Sequence

from jaxtune.cli import arguments
from jaxtune.core.errors import RequestError


def run(argv: Sequence[str]) -> int:
    """Writes a teacher's most likely tokens and returns the exit code."""
    parser = arguments.Parser(
        "data teacher",
        "Writes the most likely tokens of a model at each target, for objective.teacher_data.",
        """jaxtune data teacher --model=MODEL_DIR --source=jsonl:FILE --format=chat \\
             --seq_len=1024 --top_k=64 --out=teacher""",
    )
    parser.add_argument("--model", metavar="DIR", help="the teacher: a model or a run")
    parser.add_argument("--source", metavar="SOURCE", help="jsonl:PATH[.gz] or another source")
    parser.add_argument("--format", metavar="FORMAT", help="what a record holds")
    parser.add_argument("--out", metavar="DIR", help="directory, for any number of sources")
    parser.add_argument("--top_k", type=arguments.positive, default=64, help="tokens kept (64)")
    parser.add_argument("--temperature", type=float, default=1.0, help="of the logits (1)")
    parser.add_argument("--seq_len", type=arguments.positive, help="the run's data.seq_len")
    parser.add_argument(
        "--overlong", choices=("error", "drop", "truncate"), default="error", help="(error)"
    )
    parser.add_argument("--batch_size", type=arguments.positive, default=8, help="rows (8)")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--quantize", choices=("none", "int8", "nf4"), help="the model's kernels")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse(argv)
    for name in ("model", "source", "format", "out"):
        if getattr(args, name) is None:
            raise RequestError("is missing", key=f"--{name}")
    if not args.temperature > 0:
        raise RequestError(f"expected a number > 0; got {args.temperature}", key="--temperature")

    from jaxtune.recipes.write_teacher import write_teacher

    options = {name: value for name, value in vars(args).items() if name != "json"}
    report = write_teacher(**options)
    if args.json:
        print(json.dumps(report))
    else:
        print(
            f"written to {report['directory']}: {report['targets']} targets, the top "
            f"{report['top_k']} hold {100 * report['mass']:.2f} % on average"
        )
    return 0
