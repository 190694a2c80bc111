"""GRPO and PPO on real data: writes docs/results_rl.md.

    python -m benchmarks.results_rl                       # both, from three seeds
    python -m benchmarks.results_rl --objectives=grpo     # one of them
    python -m benchmarks.results_rl --quick --out=FILE    # two iterations, to see that it runs
    python -m benchmarks.results_rl --keep=DIR            # what DIR holds is not run again

Needs the real model and stories in ../shared.

Then `python -m benchmarks.results --objectives`: docs/results.md quotes the page.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import itertools
import json
import os
import platform
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import tasks

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
MODEL = "models/babyllama105"
WORD, NEW, LENGTH, HELD, EXAMPLES = "big", 80, 160, 64, 3
GOAL = 0.3  # of the possible gain
SEEDS = (0, 1, 2)
OPENING = re.compile(r"[^.!?]{20,70}[.!?]")

# By objective: its own keys, batch_size, steps, and the learning rate.
SETTINGS: dict[str, tuple[dict[str, Any], int, int, float]] = {
    "grpo": ({"prompts": 8, "samples": 8, "kl_coef": 0.1}, 64, 24, 1e-3),
    "ppo": ({"prompts": 64, "samples": 1, "epochs": 2, "kl_coef": 0.02}, 32, 80, 1e-3),
}


@dataclasses.dataclass(frozen=True)
class Run:
    """What came of an objective.

    Attributes:
        before, after: mean reward over samples of held-out prompts.
        kl: of the last iteration from the start, nats a completion, and a token.
        steps, iterations: done.
        seconds: of training with sampling and evaluation; sampling: of an iteration, the median.
        gap: the most that sampler and trainer were apart, nats a token on average.
        curve: mean reward of each iteration.
        examples: (prompt, completion, reward) of the last iteration.
    """

    before: float
    after: float
    kl: tuple[float, float]
    steps: int
    iterations: int
    seconds: float
    sampling: float
    gap: float
    curve: list[float]
    examples: list[tuple[str, str, float]]

    @property
    def share(self) -> float:
        """Of the gain that was possible, how much was made."""
        return (self.after - self.before) / (1 - self.before)

    @property
    def reached(self) -> int | None:
        """The first iteration whose samples have GOAL of the possible gain, from 1; or None."""
        wanted = self.before + GOAL * (1 - self.before)
        return next((n for n, reward in enumerate(self.curve, 1) if reward >= wanted), None)


def openings(model: Path) -> list[str]:
    """Returns first sentences of stories that the model can read and that lack the word."""
    known = tasks.characters(model)
    found = (OPENING.match(text) for text in tasks.stories(SHARED / "data", 1000))
    texts = [match.group(0) for match in found if match]
    fine = [t for t in texts if set(t) <= known and WORD not in t.lower()]
    return list(dict.fromkeys(fine))


def config_of(name: str, seed: int, files: tuple[Path, Path], quick: bool) -> dict[str, Any]:
    """Returns the config of a run."""
    own, batch, steps, rate = SETTINGS[name]
    rows = own["prompts"] * own["samples"]
    if quick:
        steps = 2 * own.get("epochs", 1) * rows // batch
    return {
        "seed": seed,
        "model": {"path": str(SHARED / MODEL), "dtype": "float32"},
        "peft": {"method": "lora", "rank": 8, "alpha": 16.0},
        "objective": {
            "name": name,
            "rewards": [{"function": "contains", "arguments": {"word": WORD}}],
            "max_new_tokens": NEW,
            "eval_temperature": 1.0,
            "eval_samples": 1 if quick else 4,
            **own,
        },
        "data": {
            "train": [{"source": f"jsonl:{files[0]}", "format": "prompt"}],
            "eval": [{"source": f"jsonl:{files[1]}", "format": "prompt"}],
            "seq_len": LENGTH,
        },
        "batch_size": batch,
        "total_steps": steps,
        "optim": {"lr": rate, "warmup_steps": min(5, steps)},
        "mesh": {"data": 1, "fsdp": 1},
        "log": {"every_steps": 1, "tensorboard": False},
    }


def reward_of_start(config: dict[str, Any]) -> float:
    """Returns the held-out reward before the first step, measured as the run measures it."""
    import jax

    from jaxtune.recipes.assemble import load_parts
    from jaxtune.recipes.build import build
    from jaxtune.recipes.schema.resolve import resolve

    plan = build(resolve(config))
    with jax.set_mesh(plan.mesh):
        params = load_parts(plan.base, plan.parts, plan.mesh, plan.config.seed, None)
        return plan.evaluate(*plan.parts.split(params))["eval/reward"]


def train_and_measure(config: dict[str, Any], workdir: Path) -> Run:
    """Trains an objective and says what came of it."""
    import jaxtune

    before = reward_of_start(config)
    started = time.perf_counter()
    result = jaxtune.train(config, workdir)
    seconds = time.perf_counter() - started
    first = {row["iteration"]: row for row in reversed(result.history) if "iteration" in row}
    rows = [first[number] for number in sorted(first)]
    shown = [json.loads(x) for x in (workdir / "samples.jsonl").read_text().splitlines()]
    last = [row for row in shown if row["iteration"] == rows[-1]["iteration"]]
    times = sorted(row["sampling_seconds"] for row in rows)
    return Run(
        before,
        result.summary["metrics"]["eval/reward"],
        (rows[-1]["rollout_kl/completion"], rows[-1]["rollout_kl"]),
        result.summary["step"],
        len(rows),
        seconds,
        times[len(times) // 2],
        max(row["sampler_gap"] for row in rows),
        [row["reward"] for row in rows],
        [(row["prompt"], row["completion"], row["reward"]) for row in last[:EXAMPLES]],
    )


def reached(run: Run) -> str:
    """Returns the iteration at which a run had GOAL, and about when that was."""
    if run.reached is None:
        return "not"
    return f"{run.reached} ({run.seconds * run.reached / run.iterations:.0f})"


def page(runs: dict[str, dict[int, Run]], held: int, command: str) -> str:
    """Returns the page of {objective: {seed: what came of it}}."""
    every = [run for some in runs.values() for run in some.values()]
    lines = [
        "# Reinforcement learning on real data",
        "",
        f"Written by `{command}` on {datetime.date.today().isoformat()} "
        f"({platform.machine()}, {os.cpu_count()} CPU cores, Python {platform.python_version()}); "
        "not by hand.",
        "",
        "`babyllama105`, a language model of 1M parameters that spells, continues the first "
        "sentence of a TinyStories story. The reward is verifiable: 1 if its next "
        f"{NEW} characters have the word “{WORD}”, else 0 (`contains`). LoRA of rank 8 on all "
        f"linear layers, float32. Held out: {held} first sentences, "
        "4 samples each at temperature 1.",
        "",
        "| | seed | before | after | share of the possible gain | KL, nats a completion (a token) "
        f"| iterations (steps) | seconds in all | {GOAL:g} of the gain at iteration (about s) "
        "| sampling, s an iteration |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, some in runs.items():
        lines += [
            f"| `{name}` | {seed} | {run.before:.3f} | {run.after:.3f} | {run.share:.2f} | "
            f"{run.kl[0]:.1f} ({run.kl[1]:.3f}) | {run.iterations} ({run.steps}) | "
            f"{run.seconds:.0f} | {reached(run)} | {run.sampling:.1f} |"
            for seed, run in some.items()
        ]
    lines += [
        "",
        "Seconds are of the wall, with compilation and evaluation; KL is from the model before "
        "training; when a run had a share of the gain is told by the samples of its iterations, "
        "not the held-out ones. Sampler and trainer gave the same log-probabilities to within "
        f"{max(run.gap for run in every):.1e} nats a token.",
    ]
    for name, some in runs.items():
        own, batch, _, rate = SETTINGS[name]
        keys = ", ".join(f"{key} {value:g}" for key, value in own.items())
        lines += [
            "",
            f"## {name}",
            "",
            f"{keys}, batch_size {batch}, lr {rate:g}; other keys as by default. Mean reward of "
            "each iteration's samples:",
            "",
        ]
        for seed, run in some.items():
            curve = ", ".join(f"{value:.2f}" for value in run.curve)
            lines.append(f"- seed {seed}: {curve}")
        first, run = next(iter(some.items()))
        lines += ["", f"Samples of the last iteration of seed {first}:", ""]
        for prompt, text, reward in run.examples:
            lines.append(f"- {prompt} **{text.strip()}** (reward {reward:g})")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark and writes the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--objectives", default=",".join(SETTINGS))
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results_rl.md")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--keep", type=Path)
    options = parser.parse_args(argv)
    model = SHARED / MODEL
    if not model.is_dir():
        print(f"needs the real models and data in {SHARED}", file=sys.stderr)
        return 2
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    texts, runs = openings(model), {}
    seeds = SEEDS[:1] if options.quick else SEEDS
    held = texts[: 8 if options.quick else HELD]
    with tempfile.TemporaryDirectory() as directory:
        scratch = Path(directory)
        files = scratch / "train.jsonl", scratch / "held.jsonl"
        for path, some in zip(files, (texts[HELD:], held), strict=True):
            path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in some))
        for name, seed in itertools.product(options.objectives.split(","), seeds):
            kept = None if options.keep is None else options.keep / f"{name}_{seed}.json"
            if kept is None or not kept.exists():
                config = config_of(name, seed, files, options.quick)
                run = train_and_measure(config, scratch / f"{name}_{seed}")
            else:
                run = Run(**json.loads(kept.read_text()))
            if kept is not None:
                kept.parent.mkdir(parents=True, exist_ok=True)
                kept.write_text(json.dumps(dataclasses.asdict(run)))
            runs.setdefault(name, {})[seed] = run
            print(name, seed, run, flush=True)
    command = "python -m benchmarks.results_rl" + (" --quick" if options.quick else "")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(page(runs, len(held), command))
    print(f"{options.out}: written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
