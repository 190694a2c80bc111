"""`jaxtune plan`: what a config will need and cost, before it runs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from jaxtune.cli import arguments
from jaxtune.core.errors import RequestError


def run(argv: Sequence[str]) -> int:
    """Runs the verb and returns its exit code."""
    parser = arguments.Parser(
        "plan",
        "Parameters, memory, operations, time and money of a config before it runs. No weight is "
        "read, and the data need not be here.",
        """jaxtune plan --config=configs/sft_lora.py --config.model.preset=llama3.1-8b \\
             --config.data.seq_len=8192 --config.model.remat=block --topology=v5e:4x4
           jaxtune plan --config=configs/sft_full.py --config.model.path=MODEL_DIR \\
             --devices=8xH100 --fit""",
    )
    parser.add_argument("--config", metavar="FILE[:ARG]", help=arguments.CONFIG_HELP)
    parser.add_argument(
        "--topology", metavar="CHIP:SIZE", help="compile the step for a TPU slice, such as v5e:4x4"
    )
    parser.add_argument(
        "--devices", metavar="COUNTxCHIP", help="estimate for chips, such as 8xH100; else for here"
    )
    parser.add_argument(
        "--price", metavar="USD|FILE", help="dollars an hour of one device, or a file {chip: price}"
    )
    parser.add_argument(
        "--fit", action="store_true", help="search the fastest settings that fit, and print them"
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="with --topology: compile with the least effort; memory may be a quarter off",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    split = arguments.split(argv)
    args = parser.parse(split.rest)
    if split.config is None:
        raise RequestError("--config=FILE is missing (see jaxtune plan --help)")
    if args.topology is not None:
        from jaxtune.planning import topology

        topology.parse(args.topology)
        topology.prepare()

    from jaxtune.cli import config_file

    loaded = config_file.load(split.config, split.overrides)
    with loaded.located():
        from jaxtune.recipes.plans import plan

        options = {"devices": args.devices, "price": args.price, "quick": args.quick}
        if args.fit:
            from jaxtune.recipes.plans import fit as plan_fit

            result = plan_fit.fit(loaded.raw, args.topology, **options)
        else:
            result = plan.plan(loaded.raw, args.topology, **options)
    if args.json:
        print(json.dumps(result))
    else:
        show(result)
    return 0


def show(result: Mapping[str, Any]) -> None:
    """Prints a plan as tables, and the lines to paste of `--fit`."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table("", "", show_header=False, box=None)
    for label, text in rows(result):
        table.add_row(label, text)
    console.print(table)
    if "fit" in result:
        console.print(f"\n{result['fit']['searched']} settings compared. Lines for the config:\n")
        for line in result["fit"]["lines"]:
            console.print(f"    {line}", markup=False, highlight=False, soft_wrap=True)


def rows(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Returns (label, text) of each line that is shown."""
    parameters, sizes = result["parameters"], result["bytes_per_device"]
    devices, price = result["devices"], result["price"]
    out = [
        ("devices", devices["asked"]),
        ("mesh", " × ".join(f"{a}={n}" for a, n in result["mesh"].items() if n > 1) or "1"),
        ("parameters", f"{parameters['total']:,}, {parameters['trainable']:,} trained"),
        ("tokens a step", f"{result['tokens_per_step']:,}"),
        ("operations a step", f"{result['flops_per_step']:.3g}"),
        ("attention", result["attention"]),
    ]
    out += [
        (f"  {name.replace('_', ' ')}", gib(size))
        for name, size in sizes.items()
        if name not in ("total", "kv_cache")
    ]
    out.append(("bytes a device, estimated", gib(sizes["total"])))
    if "compiled" in result:
        out += _compiled_rows(result["compiled"])
    verdict = "fits" if result["fits"] else "does not fit"
    out.append(
        (
            verdict,
            f"{gib(abs(result['headroom_bytes']))} "
            f"{'free' if result['headroom_bytes'] >= 0 else 'too much'} of "
            f"{gib(result['usable_bytes_per_device'])}",
        )
    )
    if "sampling" in result:
        out += _sampling_rows(result["sampling"])
    out.append(("seconds a step, at least", f"{result['step_seconds']:.4g}"))
    out += [(f"  {name}", f"{value:.4g}") for name, value in result["seconds"].items()]
    out.append(("limit", result["binding_limit"]))
    out.append(("steps", f"{_or_unknown(result['steps'], ',')} ({result['length_from']})"))
    if result["tokens"] is not None:
        out.append(("tokens", f"{result['tokens']:,}"))
    if result["run_seconds"] is not None:
        out.append(("hours, at least", f"{result['run_seconds'] / 3600:.3g}"))
    if price["usd_per_device_hour"] is None:
        out.append(("US dollars", f"no price of {devices['chip']} is known; give --price"))
    else:
        source = f"{price['usd_per_device_hour']:g} an hour of a device, {price['source']}"
        out.append(("US dollars, at least", f"{_or_unknown(result['cost_usd'], '.2f')} ({source})"))
    return out


def _sampling_rows(drawn: Mapping[str, Any]) -> list[tuple[str, str]]:
    out = [
        (
            "an iteration samples, at most",
            f"{drawn['tokens']:,} tokens in {drawn['samples']:,} completions, for {drawn['steps']} "
            "steps",
        )
    ]
    if drawn["engine"] == "local":
        out.append(("  cache of", f"{drawn['rows']} rows, {gib(drawn['kv_cache_bytes'])}"))
        limit = f"{drawn['decode_seconds']:.4g} ({drawn['binding_limit']})"
        out.append(("  seconds of writing, at least", limit))
    seconds = f"{drawn['seconds']:.4g}" + (
        "" if drawn["engine"] == "local" else ", the server's not counted"
    )
    return [*out, ("  seconds in all, at least", seconds)]


def _compiled_rows(compiled: Mapping[str, Any]) -> list[tuple[str, str]]:
    out = [
        ("bytes a device, compiled", gib(compiled["total_bytes"])),
        (
            "  arguments, temporary",
            f"{gib(compiled['argument_bytes'])}, {gib(compiled['temp_bytes'])}",
        ),
        ("compiled in", f"{compiled['compile_seconds']:.0f} s"),
    ]
    for kind, row in (compiled["collectives"] or {}).items():
        out.append((f"  {kind}", f"{row['count']:,} × a step, {gib(row['bytes'])}"))
    if compiled["uncounted_loops"]:
        said = f"{compiled['uncounted_loops']}, what is inside is counted once"
        out.append(("  loops as the data say", said))
    return out


def _or_unknown(value: float | None, form: str) -> str:
    return "unknown" if value is None else format(value, form)


def gib(size: float) -> str:
    """Returns bytes as a person reads them.

    >>> gib(3 * 2**30), gib(5 * 2**20)
    ('3.00 GiB', '5.0 MiB')
    """
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
