"""Time and memory of a training step beside the same step written by hand.

    python -m benchmarks.step            # prints the table
    python -m benchmarks.step --write    # and writes docs/performance.md
    python -m benchmarks.step --preset=tiny-1m --batch_size=2 --seq_len=32 --rounds=2

Steps of the contestants take turns in one process, so that a busy machine slows all of them.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import reference
from benchmarks.page import table

ROOT = Path(__file__).resolve().parents[1]
RANK, ALPHA, RATE = 8, 16.0, 1e-3
MIB = 2**20


@dataclasses.dataclass
class Contestant:
    """A way to take a step.

    Attributes:
        name: of its row.
        step: takes one and returns its loss.
        compile_seconds: tracing and compiling; None if nothing is compiled.
        memory: bytes of arguments, results and temporaries (XLA's count); None if unknown.
        flops: XLA's count, with the body of the scan over layers counted once; None if unknown.
        seconds, cpu_seconds: of each step; the second is of all threads, which a busy machine
            lengthens less.
    """

    name: str
    step: Callable[[], float]
    compile_seconds: float | None = None
    memory: int | None = None
    flops: float | None = None
    seconds: list[float] = dataclasses.field(default_factory=list)
    cpu_seconds: list[float] = dataclasses.field(default_factory=list)

    def time_step(self) -> None:
        """Takes a step and notes its time."""
        wall, cpu = time.perf_counter(), time.process_time()
        self.step()
        self.seconds.append(time.perf_counter() - wall)
        self.cpu_seconds.append(time.process_time() - cpu)


def product(config: dict) -> tuple[Contestant, Any, Any]:
    """Returns (jaxtune's own step, its Plan, its parameters as (trainable, frozen) copies)."""
    import jax
    import jax.numpy as jnp

    from jaxtune.parallel.batches import global_batch
    from jaxtune.recipes.assemble import load_parts
    from jaxtune.recipes.build import build
    from jaxtune.recipes.schema.resolve import resolve
    from jaxtune.training.compile import fresh_state

    plan = build(resolve(config))
    with jax.set_mesh(plan.mesh):
        params = load_parts(plan.base, plan.parts, plan.mesh, 0, None)
        trainable, frozen = plan.parts.split(params)
        copies = jax.tree.map(jnp.copy, (trainable, frozen))
        state = fresh_state(trainable, plan.tx, 0, plan.layout)
        batches = plan.data.stream.batches(config["batch_size"], 1)
        batch = global_batch(next(iter(batches)), plan.mesh)
        started = time.perf_counter()
        compiled = plan.step.lower(state, frozen, batch).compile()
        seconds = time.perf_counter() - started

    def step() -> float:
        nonlocal state
        state, report = compiled(state, frozen, batch)
        return float(report["loss"])

    found = Contestant("jaxtune", step, seconds, memory(compiled), flops(compiled))
    return found, plan, (*copies, np.asarray(batch["input_ids"]))


def by_hand(plan: Any, params: tuple) -> Contestant:
    """Returns the hand-written JAX step on the same weights and tokens."""
    import jax

    from jaxtune.core.tree import combine

    trainable, frozen, ids = params
    tx, step_fn = reference.make_step(plan.parts.config, ALPHA / RANK, RATE, combine)
    opt_state = tx.init(trainable)
    started = time.perf_counter()
    compiled = step_fn.lower(trainable, opt_state, frozen, ids).compile()
    seconds = time.perf_counter() - started
    rows = jax.device_put(ids)

    def step() -> float:
        nonlocal trainable, opt_state
        trainable, opt_state, value = compiled(trainable, opt_state, frozen, rows)
        return float(value)

    return Contestant("plain JAX", step, seconds, memory(compiled), flops(compiled))


def by_torch(plan: Any, method: str, ids: np.ndarray) -> list[Contestant]:
    """Returns the eager PyTorch step on random weights; none where a package is missing."""
    try:
        step = reference.torch_step(plan.parts.config, method, RANK, ALPHA, RATE, ids)
    except ImportError as error:
        print(f"without PyTorch: {error}", file=sys.stderr)
        return []
    return [Contestant("transformers" + " + PEFT" * (method == "lora"), step)]


def memory(compiled: Any) -> int:
    """Returns the bytes that a compiled program needs."""
    m = compiled.memory_analysis()
    return (
        m.argument_size_in_bytes
        + m.output_size_in_bytes
        + m.temp_size_in_bytes
        - m.alias_size_in_bytes
    )


def flops(compiled: Any) -> float:
    """Returns XLA's count of a compiled program's floating-point operations."""
    return compiled.cost_analysis()["flops"]


def contest(method: str, options: argparse.Namespace, scratch: Path) -> list[Contestant]:
    """Returns the contestants of a method, timed.

    Raises:
        AssertionError: the two JAX programs do not compute the same losses.
    """
    from jaxtune.models.presets import preset

    path = scratch / "tokens.jsonl"
    shape = (options.batch_size, options.seq_len)
    ids = np.random.default_rng(0).integers(0, preset(options.preset).vocab_size, shape)
    path.write_text("".join(json.dumps({"input_ids": row.tolist()}) + "\n" for row in ids))
    lora = {"rank": RANK, "alpha": ALPHA} if method == "lora" else {}
    config = {
        "model": {"preset": options.preset, "dtype": "float32"},
        "peft": {"method": method, **lora},
        "data": {
            "train": [{"source": f"jsonl:{path}", "format": "tokens"}],
            "seq_len": options.seq_len,
            "shuffle": False,
        },
        "batch_size": options.batch_size,
        "total_steps": 1000,
        "optim": {"name": "adamw", "lr": RATE},
        "mesh": {"data": 1, "fsdp": 1},
    }
    ours, plan, params = product(config)
    found = [ours, by_hand(plan, params)]
    if options.torch:
        found += by_torch(plan, method, params[2])
    losses = [[one.step() for one in found] for _ in range(2)]
    np.testing.assert_allclose([row[0] for row in losses], [row[1] for row in losses], rtol=1e-4)
    for number in range(options.rounds):
        for one in found[number % len(found) :] + found[: number % len(found)]:
            one.time_step()
    return found


def rows_of(method: str, found: Sequence[Contestant], tokens: int) -> list[list[str]]:
    """Returns the table rows of a method; the ratios are to jaxtune's medians."""
    ours = statistics.median(found[0].seconds), statistics.median(found[0].cpu_seconds)
    rows = []
    for one in found:
        middle, cpu = statistics.median(one.seconds), statistics.median(one.cpu_seconds)
        rows.append(
            [
                f"{method}, {one.name}",
                f"{middle:.3f}",
                f"{min(one.seconds):.3f}",
                f"{cpu:.3f}",
                f"{middle / ours[0]:.2f}",
                f"{cpu / ours[1]:.2f}",
                f"{tokens / middle:,.0f}",
                "" if one.compile_seconds is None else f"{one.compile_seconds:.1f}",
                "" if one.memory is None else f"{one.memory / MIB:,.0f}",
                "" if one.flops is None else f"{one.flops / 1e9:.2f}",
            ]
        )
    return rows


HEADER = (
    *("step", "median s", "fastest s", "CPU s", "ratio", "CPU ratio", "tokens/s"),
    *("compile s", "memory MiB", "GFLOP"),
)


def page(body: str, argv: Sequence[str], options: argparse.Namespace) -> str:
    """Returns docs/performance.md."""
    from jaxtune.recipes.versions import versions

    facts = {
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python -m benchmarks.step", *argv]),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPU cores",
        "load when it ended": f"{os.getloadavg()[0]:.1f}",
        "python": platform.python_version(),
        **versions(),
    }
    return "\n".join(
        [
            "# Speed of a training step\n",
            "Written by `benchmarks/step.py`; no figure is typed by hand.\n",
            table(["", "this page was made with"], [[k, f"`{v}`"] for k, v in facts.items()]),
            f"Preset `{options.preset}`, random weights, {options.batch_size} × {options.seq_len}"
            f" tokens a step, float32, AdamW with clip 1.0, LoRA r = {RANK} on every linear layer."
            " *plain JAX* is the same step written by hand (`benchmarks/reference.py`); its losses"
            " are checked against jaxtune's to 1e-4 in the same run. *transformers* runs eagerly"
            " in PyTorch. The contestants' steps take turns in one process; *CPU s* is the"
            " median over all threads, and the ratios are to jaxtune's: above 1 where jaxtune is"
            " faster. *Memory* is XLA's count of"
            " arguments, results and temporaries; *GFLOP* is XLA's count, which counts the scan's"
            " body once.\n",
            body,
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the contest and prints its table."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="small-20m")
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--seq_len", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--methods", default="lora,full")
    parser.add_argument("--torch", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "performance.md")
    options = parser.parse_args(argv)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for method in options.methods.split(","):
            found = contest(method, options, Path(scratch))
            rows += rows_of(method, found, options.batch_size * options.seq_len)
    body = table(HEADER, rows)
    print(body)
    if options.write:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(page(body, argv, options))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
