"""`jaxtune export`: writes weights or adapter for other tools."""

from __future__ import annotations

import json
from collections.abc import Sequence

from jaxtune.cli import arguments, source
from jaxtune.core.errors import RequestError

FORMATS = ("hf", "peft", "jaxtune", "gguf")
DTYPES = ("float32", "bfloat16", "float16", "q8_0")


def run(argv: Sequence[str]) -> int:
    """Runs the verb and returns its exit code."""
    parser = arguments.Parser(
        "export",
        "Writes merged or full weights (hf, gguf), or the adapter alone (peft, jaxtune), and "
        "reads them back.",
        """jaxtune export --model=runs/first --format=peft --out=adapter
           jaxtune export --workdir=runs/first --format=gguf --dtype=q8_0
           jaxtune export --model=runs/first --format=hf --tuned_share=0.7 --out=gentler
           jaxtune export --model=runs/first --with=runs/second --merge=ties \\
             --format=hf --out=both""",
    )
    arguments.add_source(parser)
    parser.add_argument("--format", choices=FORMATS, help="what is written")
    parser.add_argument("--dtype", choices=DTYPES, help="of hf's and gguf's weights")
    parser.add_argument("--out", metavar="DIR", help="where (WORKDIR/export/FORMAT)")
    parser.add_argument(
        "--pick",
        choices=("knee", "target", "retention"),
        help="which checkpoint of a run with retention.data (its result)",
    )
    parser.add_argument(
        "--tuned_share",
        type=float,
        metavar="X",
        help="of what tuning changed: 1 all (the default), 0 the base, between: WiSE-FT",
    )
    parser.add_argument(
        "--with", action="append", default=[], metavar="RUN", help="another run of the same base"
    )
    parser.add_argument(
        "--merge", metavar="HOW", help="of several runs: soup (default), ties, dare"
    )
    parser.add_argument(
        "--density", type=float, metavar="X", help="part that ties and dare keep (0.5)"
    )
    parser.add_argument("--json", action="store_true", help="print the report as one JSON object")
    split = arguments.split(argv)
    args = parser.parse(split.rest)
    others = vars(args)["with"]
    if args.merge is not None and not others:
        raise RequestError("needs --with=RUN, another run to merge", key="--merge")
    if args.density is not None and args.merge in (None, "soup"):
        raise RequestError("is used by --merge=ties and --merge=dare only", key="--density")
    if args.format is None:
        raise RequestError(f"is missing: one of {', '.join(FORMATS)}", key="--format")
    found = source.find(split, args)
    if args.out is None and args.model is not None:
        raise RequestError("is missing: where the export goes", key="--out")
    out = args.out or str(found.path / "export" / args.format)

    from jaxtune.recipes import export

    given = {
        "adapter": found.adapter,
        "dtype": args.dtype,
        "pick": args.pick,
        "others": others or None,
        "merge": args.merge,
        "tuned_share": args.tuned_share,
        "density": args.density,
    }
    given = {name: value for name, value in given.items() if value is not None}
    with arguments.flagged(args):
        report = export.export(str(found.path), args.format, out, **given)
    if args.json:
        print(json.dumps(report))
    else:
        for name, value in report.items():
            print(f"{name}: {value}")
    return 0
