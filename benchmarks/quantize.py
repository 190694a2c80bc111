"""What a quantised base saves and costs: bytes, time of a training step, loss of real models.

    python -m benchmarks.quantize            # prints the tables
    python -m benchmarks.quantize --write    # and writes them into docs/methods.md

Steps of the kinds take turns in one process, so that a busy machine slows all of them.
"""

from __future__ import annotations

import argparse
import dataclasses
import gzip
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.page import table

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
PAGE = ROOT / "docs" / "methods.md"
BEGIN, END = "<!-- begin benchmarks/quantize.py -->\n", "<!-- end benchmarks/quantize.py -->\n"
KINDS = ("none", "int8", "nf4")
LARGE = ("llama3.2-1b", "gemma2-9b", "llama3.1-8b", "qwen3-30b-a3b", "llama3.1-70b")
STORIES, CONTEXT = 100, 256


def bytes_table() -> str:
    """Returns the bytes of the base's weights, embedding included, for large presets."""
    import jax.numpy as jnp

    from jaxtune.core.tree import flatten
    from jaxtune.models.decoder import abstract_params
    from jaxtune.models.presets import preset
    from jaxtune.peft.method import Method

    def size(config: Any) -> float:
        leaves = flatten(abstract_params(config, Method())).values()
        # whole leaves are bfloat16, quantised ones what they say
        return sum(x.size * (2 if x.dtype == jnp.float32 else x.dtype.itemsize) for x in leaves)

    rows = []
    for name in LARGE:
        sizes = [size(dataclasses.replace(preset(name), quantize=kind)) for kind in KINDS]
        rows.append([name, *(f"{n / 2**30:.1f} GiB" for n in sizes), f"{sizes[0] / sizes[2]:.1f}"])
    return table(["base", "bfloat16", "`int8`", "`nf4`", "none / nf4"], rows)


def prepared(kind: str, args: argparse.Namespace, directory: Path) -> tuple[Any, Any, dict]:
    """Returns (a function that takes a step, XLA's memory, the base's bytes) of a LoRA run."""
    import jax

    from jaxtune.core.tree import nbytes
    from jaxtune.parallel.batches import global_batch
    from jaxtune.recipes.assemble import load_parts
    from jaxtune.recipes.build import build
    from jaxtune.recipes.schema.resolve import resolve
    from jaxtune.training.compile import fresh_state

    rng = np.random.default_rng(0)
    source = directory / "tokens.jsonl"
    lines = [{"input_ids": rng.integers(0, 500, args.seq_len).tolist()} for _ in range(64)]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = resolve(
        {
            "model": {"preset": args.preset, "dtype": args.dtype, "quantize": kind},
            "peft": {"method": "lora", "rank": 8},
            "data": {
                "train": [{"source": f"jsonl:{source}", "format": "tokens"}],
                "seq_len": args.seq_len,
            },
            "batch_size": args.batch_size,
            "total_steps": 1000,
            "optim": {"lr": 1e-3},
            "mesh": {"fsdp": 1},
        }
    )
    plan = build(config)
    with jax.set_mesh(plan.mesh):
        params = load_parts(plan.base, plan.parts, plan.mesh, 0, None)
        trainable, frozen = plan.parts.split(params)
        held = {"state": fresh_state(trainable, plan.tx, 0, plan.layout)}
        batch = global_batch(next(plan.data.stream.batches(args.batch_size, 1000)), plan.mesh)
        compiled = plan.step.lower(held["state"], frozen, batch).compile()

    def step() -> float:
        with jax.set_mesh(plan.mesh):
            held["state"], report = compiled(held["state"], frozen, batch)
            return float(report["loss"])

    return step, compiled.memory_analysis(), {"base": nbytes(frozen)}


def step_table(args: argparse.Namespace) -> str:
    """Returns bytes and time of a LoRA step, measured here."""
    with tempfile.TemporaryDirectory() as directory:
        made = {kind: prepared(kind, args, Path(directory)) for kind in KINDS}
    times: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for number in range(args.rounds + 1):
        for kind, (step, _, _) in made.items():
            started = time.perf_counter()
            step()
            if number:
                times[kind].append(time.perf_counter() - started)
    # the least disturbed pairs: each kind's step over the plain one's of the same round
    plain = times["none"]
    rows = []
    for kind, (_, memory, sizes) in made.items():
        ratio = statistics.median(a / b for a, b in zip(times[kind], plain, strict=True))
        rows.append(
            [
                f"`{kind}`",
                f"{sizes['base'] / 2**20:.1f} MiB",
                f"{memory.argument_size_in_bytes / 2**20:.1f} MiB",
                f"{memory.temp_size_in_bytes / 2**20:.0f} MiB",
                f"{statistics.median(times[kind]):.2f} s",
                f"{ratio:.2f}",
            ]
        )
    return table(["quantize", "base", "arguments", "temporaries", "step", "ratio"], rows)


def loss_table() -> str:
    """Returns the NLL a token of stories under real models, whole and quantised."""
    import jaxtune

    texts = json.loads(
        gzip.decompress((SHARED / "data/texts/tinystories_1000.json.gz").read_bytes())
    )
    rows = []
    for name in ("stories260k", "babyllama105"):
        found = []
        for kind in KINDS:
            lm = jaxtune.load(SHARED / "models" / name, dtype="float32", quantize=kind)
            total = count = 0.0
            for start in range(0, STORIES, 20):
                ids, mask = (np.zeros((20, CONTEXT), np.int32) for _ in range(2))
                for i, text in enumerate(texts[start : start + 20]):
                    row = lm.tokenizer.encode(text)[:CONTEXT]
                    ids[i, : len(row)], mask[i, : len(row)] = row, 1
                total -= float(np.asarray(lm.logprobs(ids, mask), np.float64).sum())
                count += mask[:, 1:].sum()
            found.append(total / count)
        rows.append([f"`{name}`", *(f"{nll:.4f}" for nll in found)])
    return table(["NLL a token", "`none`", "`int8`", "`nf4`"], rows)


def section(args: argparse.Namespace) -> str:
    """Returns what stands between the markers of the page."""
    import jax

    where = f"{platform.machine()}, {os.cpu_count()} cores, jax {jax.__version__}"
    shape = f"`{args.preset}`, {args.dtype}, {args.batch_size} × {args.seq_len} tokens"
    parts = [
        "Weights of the base, embedding and head (always `model.dtype`) included:\n\n",
        bytes_table(),
        f"\nA LoRA step (rank 8, all linear layers; {shape}) on a CPU ({where}), median of "
        f"{args.rounds} rounds in turns; the ratio is to the step of `none` in the same round:\n\n",
        step_table(args),
    ]
    if SHARED.is_dir():
        parts += [
            f"\nLoss of two very small real models on {STORIES} stories, float32, not trained "
            "further:\n\n",
            loss_table(),
        ]
    return "".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="small-20m")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--seq_len", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    text = section(args)
    print(text)
    if args.write:
        page = PAGE.read_text(encoding="utf-8")
        before, rest = page.split(BEGIN)
        PAGE.write_text(before + BEGIN + text + END + rest.split(END)[1], encoding="utf-8")


if __name__ == "__main__":
    main()
