"""`jaxtune sweep`: runs a config's trials and ranks them."""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jaxtune.cli import arguments
from jaxtune.core.errors import RequestError

if TYPE_CHECKING:
    from jaxtune.cli.config_file import ConfigFile
    from jaxtune.recipes.schema.resolve import Resolved
    from jaxtune.recipes.sweep.hyper import Trial
    from jaxtune.recipes.sweep.sweep import Row


def run(argv: Sequence[str]) -> int:
    """Runs the verb and returns its exit code."""
    parser = arguments.Parser(
        "sweep",
        "Runs the trials of get_hyper(h), or of --sweep.KEY=V1,V2 (several: every combination),"
        "\none after the other, each in WORKDIR/trials/NNN-NAME. The same command again continues.",
        """jaxtune sweep --config=configs/lora_sweep.py --config.model.path=MODEL_DIR \\
             '--config.data.train[0].source=jsonl:FILE' \\
             '--config.data.eval[0].source=jsonl:FILE' --workdir=runs/sweep
           jaxtune sweep --config=configs/sft_lora.py --config.model.path=MODEL_DIR \\
             '--config.data.train[0].source=jsonl:FILE' --sweep.optim.lr=1e-4,3e-4 \\
             --metric=loss --workdir=runs/rates""",
    )
    parser.add_argument("--config", metavar="FILE[:ARG]", help=arguments.CONFIG_HELP)
    parser.add_argument("--workdir", metavar="DIR", help="directory of the sweep")
    parser.add_argument("--metric", default="eval/loss", help="ranks the trials (eval/loss)")
    parser.add_argument("--mode", default="min", choices=("min", "max"), help="best is (min)")
    parser.add_argument("--dry_run", action="store_true", help="check and list the trials only")
    parser.add_argument(
        "--allow_change", action="store_true", help="continue although the config changed"
    )
    split = arguments.split(argv, sweep=True)
    args = parser.parse(split.rest)
    if split.config is None:
        raise RequestError("--config=FILE is missing (see jaxtune sweep --help)")
    workdir = (
        None if args.dry_run and args.workdir is None else arguments.require_workdir(args.workdir)
    )

    from rich.console import Console

    from jaxtune.cli import config_file
    from jaxtune.recipes.sweep import sweep

    console = Console()
    loaded = config_file.load(split.config, split.overrides)
    with loaded.located(), _swept(split.sweeps):
        planned = sweep.plan(loaded.raw, _trials(loaded, split.sweeps))
    if args.dry_run:
        for trial in planned:
            console.print(pathlib.PurePath(trial.directory).name, highlight=False)
        return 0

    from jaxtune.recipes.base import is_run
    from jaxtune.recipes.sweep import metrics as sweep_metrics

    if is_run(workdir):
        raise RequestError(
            "holds a run; trials go into a directory of their own", key="--workdir", where=workdir
        )
    # What is wrong with every trial is known before a directory is made.
    with loaded.located():
        sweep.check_evaluated(planned, args.metric)
        sweep.check_metric(args.metric, sweep_metrics.metric_names(planned[0].config))
    rows = sweep.run_sweep(
        planned,
        workdir,
        lambda config, directory: _train(config, directory, args.allow_change),
        metric=args.metric,
        mode=args.mode,
        allow_change=args.allow_change,
        report=lambda line: console.print(line, highlight=False, markup=False),
    )
    console.print(_table(rows, args.metric))
    console.print(f"written to {workdir / 'results.csv'}", highlight=False)
    return 0 if all(row.status in ("finished", "kept") for row in rows) else 1


@contextlib.contextmanager
def _swept(flags: Sequence[tuple[str, str]]) -> Iterator[None]:
    """Names the flag where a RequestError is about a key that one sweeps over."""
    try:
        yield
    except RequestError as error:
        if error.where is not None or error.key not in dict(flags):
            raise
        raise RequestError(error.message, where=f"--sweep.{error.key}") from None


def _trials(loaded: ConfigFile, flags: Sequence[tuple[str, str]]) -> list[Trial]:
    from jaxtune.recipes.sweep.hyper import Hyper, from_flags

    parts = []
    if loaded.get_hyper is not None:
        parts.append(loaded.hyper(Hyper()))
    if flags:
        parts.append(from_flags(flags))
    if not parts:
        raise RequestError(
            "nothing to sweep: give --sweep.KEY=V1,V2, or a config with get_hyper(h)",
            where=loaded.path,
        )
    return Hyper.product(*parts) if len(parts) > 1 else parts[0]


def _train(config: Resolved, directory: pathlib.Path, allow_change: bool) -> Mapping[str, Any]:
    from jaxtune.recipes import train

    return train.train(config, directory, allow_change=allow_change).summary


def _table(rows: Sequence[Row], metric: str) -> Any:
    from rich.table import Table

    keys = list(dict.fromkeys(key for row in rows for key in row.overrides))
    table = Table(title="trials, best first", title_justify="left")
    for name in ("", metric, *keys, "status", "trial"):
        table.add_column(name)
    for number, row in enumerate(rows, 1):
        value = "" if row.metric is None else f"{row.metric:.5g}"
        values = [str(row.overrides.get(key, "")) for key in keys]
        status = f"{row.status}: {row.error}" if row.error else row.status
        table.add_row(str(number), value, *values, status, pathlib.PurePath(row.trial).name)
    return table
