"""Time of a GRPO iteration beside TRL's GRPOTrainer and Tunix's, and of sampling alone.

    python -m benchmarks.rl            # prints the tables
    python -m benchmarks.rl --write    # and writes docs/rl_performance.md
    python -m benchmarks.rl --layers=2 --width=64 --vocab=97 --tokens=4 --rounds=1

All begin with the same weights in float32 and sample for the same prompts, and their iterations
take turns in one process, so that a busy machine slows all of them. A library that cannot be
imported is left out.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks import generation
from benchmarks.page import table
from benchmarks.peers import RANK, write_model
from benchmarks.rl_entrants import KL, Entrant, by_trl, by_tunix, product, texts

ROOT = Path(__file__).resolve().parents[1]


def contest(options: argparse.Namespace, scratch: Path) -> list[Entrant]:
    """Returns the entrants, timed.

    Raises:
        AssertionError: an entrant did not sample once an iteration.
    """
    model, prompts = write_model(scratch / "model", options), texts(options)
    found = [product(model, prompts, options, scratch)]
    for make in (
        lambda: by_trl(model, prompts, options, scratch),
        lambda: by_tunix(model, prompts, options),
    ):
        try:
            found.append(make())
        except ImportError as error:
            print(f"left out: {error}", file=sys.stderr)
    started = time.perf_counter()
    for number in range(options.rounds + 1):
        if number > 1 and time.perf_counter() - started > options.seconds:
            break
        for one in found[number % len(found) :] + found[: number % len(found)]:
            one.time_step()
            print(f"{number}: {one.name} {one.seconds[-1]:.2f} s", file=sys.stderr, flush=True)
    for one in found:
        assert len(one.sampling) == len(one.seconds), f"{one.name}: {len(one.sampling)} samplings"
        # The first is for caches, lazy set-up and what is compiled when it is called.
        del one.seconds[0], one.cpu_seconds[0], one.sampling[0]
    return found


HEADER = (
    "iteration", "median s", "fastest s", "CPU s", "jaxtune's time to it", "sampling s", "tokens/s",
)  # fmt: skip


def rows_of(found: Sequence[Entrant], tokens: int) -> list[list[str]]:
    """Returns the rows of the table; the ratio is of jaxtune's iteration to each, medians."""
    ours, rows = statistics.median(found[0].seconds), []
    for one in found:
        middle, cpu = statistics.median(one.seconds), statistics.median(one.cpu_seconds)
        sampling = statistics.median(one.sampling)
        rows.append(
            [
                one.name,
                f"{middle:.2f}",
                f"{min(one.seconds):.2f}",
                f"{cpu:.2f}",
                f"{ours / middle:.2f}",
                f"{sampling:.2f}",
                f"{tokens / sampling:,.0f}",
            ]
        )
    return rows


def sampling_rows(options: argparse.Namespace, scratch: Path) -> list[list[str]]:
    """Returns the rows of the table of sampling alone: see `benchmarks.generation`."""
    from jaxtune.checkpoints.hf_export import save_hf

    parts = generation.model(options)
    rng = np.random.default_rng(0)
    shape = (options.prompts, options.prompt)
    prompts = rng.integers(1, options.vocab, shape).tolist()
    found = [generation.ours(parts, prompts, (), options.prompts * options.samples, options)]
    save_hf(scratch / "sampled", parts[0], parts[2], dtype=np.float32)
    net = generation.transformers(scratch / "sampled")
    if net is not None:
        generation.check(net, parts, prompts, min(16, options.tokens))
        found.append(generation.theirs(net, prompts, (), options))
    return generation.contest("equal lengths", found, options.rounds)


def page(
    bodies: Sequence[str], argv: Sequence[str], options: argparse.Namespace, timed: int
) -> str:
    """Returns docs/rl_performance.md."""
    from jaxtune.recipes.train import versions

    facts = {
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python -m benchmarks.rl", *argv]),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPU cores",
        "load when it ended": f"{os.getloadavg()[0]:.1f}",
        "python": platform.python_version(),
        **versions(),
    }
    return "\n".join(
        [
            "# Speed of a GRPO iteration, and of sampling\n",
            "Written by `benchmarks/rl.py`; no figure is typed by hand.\n",
            table(["", "this page was made with"], [[k, f"`{v}`"] for k, v in facts.items()]),
            f"A Llama of {options.layers} layers, {options.width} wide, with a vocabulary of"
            f" {options.vocab:,}, random weights, float32. A load above the number of cores means"
            " that other work shared the machine: seconds are then longer than they need be, and"
            " the ratios, whose rows took turns in one process, are what to read.\n",
            "## An iteration\n",
            f"{options.prompts} prompts of {options.prompt} tokens × {options.samples} samples ×"
            f" {options.tokens} tokens at temperature 1, a reward in plain Python, LoRA r = {RANK}"
            f" on every linear layer, the KL from the base ({KL:g}) in the loss, one step of AdamW"
            f" with clip 1.0 over all samples; {timed} iterations each after one that"
            " compiles. The ratio is jaxtune's median time over that of the row: below 1 where"
            " jaxtune is faster. *Sampling* is the sampler's part of the iteration. jaxtune's"
            " iteration includes a pass of the trainer over the samples, which the others leave out"
            " with one step an iteration: it compares the log-probabilities with the sampler's and"
            " stops the run where they differ. *TRL* is timed by its own `training_step`, which"
            " samples with transformers, and AdamW; *Tunix* by its learner's `train` on one batch,"
            " each prompt with a BOS in front."
            "\n",
            bodies[0],
            "## Sampling alone\n",
            f"{options.prompts} × {options.samples} samples of {options.tokens} tokens beside"
            " `generate` of transformers, all rows side by side, the same weights and the same"
            " greedy tokens, which is checked first. The ratios are of tokens a second, and of"
            " tokens a second of processor time, to transformers'.\n",
            bodies[1],
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the contests and prints their tables."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for key, value in {
        **{"layers": 4, "width": 256, "vocab": 8192, "prompts": 8, "samples": 8, "tokens": 64},
        **{"prompt": 32, "rounds": 5},
    }.items():
        parser.add_argument(f"--{key}", type=int, default=value)
    parser.add_argument("--seconds", type=float, default=600, help="no round begins after so many")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "rl_performance.md")
    options = parser.parse_args(argv)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    with tempfile.TemporaryDirectory() as scratch:
        tokens = options.prompts * options.samples * options.tokens
        found = contest(options, Path(scratch))
        bodies = [table(HEADER, rows_of(found, tokens))]
        print(bodies[0], flush=True)
        bodies.append(table(generation.HEADER, sampling_rows(options, Path(scratch))))
        print(bodies[1])
    if options.write:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(page(bodies, argv, options, len(found[0].seconds)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
