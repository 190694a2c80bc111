"""Tokens a second of sampling beside transformers' `generate`, on the same weights.

    python -m benchmarks.generation
    python -m benchmarks.generation --vocab=32000 --rounds=2
    python -m benchmarks.generation --no-torch --profile=/tmp/trace

Calls of the contestants take turns in one process, so that a busy machine slows all of them. First
all samples run to the most tokens; then one token in `--ends` ends a sample, so that lengths differ
and slots are refilled. Both write the same greedy tokens, which is checked first.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.page import table


@dataclasses.dataclass
class Contestant:
    """A way to sample.

    Attributes:
        name: of its row.
        sample: draws the samples of a seed and returns how many tokens they have.
        seconds, cpu_seconds: of each call; the second is of all threads.
        tokens: of each call.
    """

    name: str
    sample: Callable[[int], int]
    seconds: list[float] = dataclasses.field(default_factory=list)
    cpu_seconds: list[float] = dataclasses.field(default_factory=list)
    tokens: list[int] = dataclasses.field(default_factory=list)

    def time_call(self, seed: int) -> None:
        """Draws once and notes time and tokens."""
        wall, cpu = time.perf_counter(), time.process_time()
        self.tokens.append(self.sample(seed))
        self.seconds.append(time.perf_counter() - wall)
        self.cpu_seconds.append(time.process_time() - cpu)

    @property
    def rate(self) -> float:
        """Tokens a second, the median over the calls."""
        return statistics.median(n / s for n, s in zip(self.tokens, self.seconds, strict=True))

    @property
    def cpu_rate(self) -> float:
        """Tokens a second of processor time, the median over the calls."""
        return statistics.median(n / s for n, s in zip(self.tokens, self.cpu_seconds, strict=True))


def model(options: argparse.Namespace) -> tuple[Any, Any, Any]:
    """Returns (config, method, params) of a random Llama."""
    import jax

    from jaxtune.models.config import ModelConfig
    from jaxtune.models.decoder import init_params
    from jaxtune.peft.method import Method

    config = ModelConfig(
        vocab_size=options.vocab,
        hidden_size=options.width,
        intermediate_size=options.width * 8 // 3 // 8 * 8,
        num_layers=options.layers,
        num_heads=options.width // 64,
        num_kv_heads=options.width // 64,
        head_dim=64,
        max_position_embeddings=1024,
        dtype="float32",
        attention="heads",
    )
    return config, Method(), init_params(config, Method(), jax.random.key(0))


def ours(
    parts: tuple, prompts: list[list[int]], eos: Sequence[int], slots: int, options: Any
) -> Contestant:
    """Returns jaxtune's sampler."""
    from jaxtune.generate.sampler import sample

    def run(seed: int) -> int:
        settings = {"max_new_tokens": options.tokens, "seed": seed, "slots": slots}
        found = sample(*parts, prompts, options.samples, eos_ids=eos, **settings)
        return sum(len(one.ids) for group in found for one in group)

    return Contestant(f"jaxtune, {slots} slots", run)


def transformers(directory: Path) -> Any:
    """Returns the model as transformers loads it, or None where a package is missing."""
    try:
        from transformers import AutoModelForCausalLM
    except ImportError as error:
        print(f"without PyTorch: {error}", file=sys.stderr)
        return None
    return AutoModelForCausalLM.from_pretrained(directory, dtype="float32").eval()


def padded(prompts: list[list[int]]) -> dict[str, Any]:
    """Returns the prompts as transformers reads them: left-padded."""
    import torch

    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    return {"input_ids": ids, "attention_mask": mask}


def theirs(net: Any, prompts: list[list[int]], eos: Sequence[int], options: Any) -> Contestant:
    """Returns transformers' `generate` with all samples in one batch."""
    import torch

    batch, ends = padded(prompts), torch.tensor(list(eos) or [-1])
    width = batch["input_ids"].shape[1]

    def run(seed: int) -> int:
        torch.manual_seed(seed)
        with torch.inference_mode():
            out = net.generate(
                **batch,
                do_sample=True,
                top_k=0,
                top_p=1.0,
                temperature=1.0,
                num_return_sequences=options.samples,
                max_new_tokens=options.tokens,
                eos_token_id=list(eos) or None,
                pad_token_id=0,
            )[:, width:]
        over = torch.isin(out, ends)
        return int((over.long().cumsum(1) - over.long() == 0).sum())

    return Contestant("transformers", run)


def check(net: Any, parts: tuple, prompts: list[list[int]], tokens: int) -> None:
    """Raises AssertionError if the two models do not write the same greedy tokens."""
    import torch

    from jaxtune.generate.engine import generate

    batch = padded(prompts)
    with torch.inference_mode():
        out = net.generate(**batch, do_sample=False, max_new_tokens=tokens, pad_token_id=0)
    wanted = out[:, batch["input_ids"].shape[1] :].tolist()
    assert generate(*parts, prompts, max_new_tokens=tokens) == wanted


def contest(name: str, found: list[Contestant], rounds: int) -> list[list[str]]:
    """Returns the rows of a table, after one call that compiles and `rounds` that are timed."""
    for one in found:
        one.sample(0)
    for number in range(rounds):
        for one in found[number % len(found) :] + found[: number % len(found)]:
            one.time_call(number + 1)
    last = found[-1]
    return [
        [
            f"{name}, {one.name}",
            f"{statistics.median(one.seconds):.3f}",
            f"{statistics.mean(one.tokens):,.0f}",
            f"{one.rate:,.0f}",
            f"{one.rate / last.rate:.2f}",
            f"{one.cpu_rate / last.cpu_rate:.2f}",
        ]
        for one in found
    ]


HEADER = ("sampling", "median s", "tokens", "tokens/s", "ratio", "CPU ratio")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the contest and prints its table; ratios are to the last row of each part."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for key, value in {
        **{"layers": 4, "width": 256, "vocab": 8192, "prompts": 8, "samples": 8, "tokens": 64},
        **{"ends": 24, "rounds": 5},
    }.items():
        parser.add_argument(f"--{key}", type=int, default=value)
    parser.add_argument("--slots", default="64,32,16")
    parser.add_argument("--torch", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--profile", type=Path, help="directory for a jax.profiler trace")
    options = parser.parse_args(argv)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    parts = model(options)
    noise = np.random.default_rng(0)
    prompts = [
        noise.integers(1, options.vocab, noise.integers(9, 33)).tolist()
        for _ in range(options.prompts)
    ]
    net = None
    if options.torch:
        from jaxtune.checkpoints.hf_export import save_hf

        with tempfile.TemporaryDirectory() as scratch:
            save_hf(Path(scratch) / "model", parts[0], parts[2], dtype=np.float32)
            net = transformers(Path(scratch) / "model")
    if net is not None:
        check(net, parts, prompts, 16)
    rows = []
    slots = [int(n) for n in options.slots.split(",")]
    for name, eos in (
        ("equal lengths", ()),
        ("unequal lengths", range(1, 1 + options.vocab // options.ends)),
    ):
        found = [ours(parts, prompts, eos, n, options) for n in slots]
        if net is not None:
            found.append(theirs(net, prompts, eos, options))
        rows += contest(name, found, options.rounds)
    print(table(HEADER, rows))
    if options.profile is not None:
        import jax

        with jax.profiler.trace(str(options.profile)):
            ours(parts, prompts, (), slots[0], options).sample(99)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
