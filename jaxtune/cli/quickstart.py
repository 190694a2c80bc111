"""`jaxtune quickstart`: the whole story on built-in data."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtune.cli import arguments


def run(argv: Sequence[str]) -> int:
    """Runs the verb and returns its exit code."""
    parser = arguments.Parser(
        "quickstart",
        "Pretrains a tiny model on generated data, tunes it with LoRA, and shows before and after.",
        "jaxtune quickstart --workdir=runs/quickstart",
    )
    parser.add_argument(
        "--workdir", metavar="DIR", default="runs/quickstart", help="(runs/quickstart)"
    )
    args = parser.parse(argv)
    workdir = arguments.require_workdir(args.workdir)

    from jaxtune.recipes import quickstart

    return quickstart.main(str(workdir))
