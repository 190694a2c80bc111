"""Time of a DPO step with a LoRA beside TRL's DPOTrainer and Tunix's.

    python -m benchmarks.dpo            # prints the table
    python -m benchmarks.dpo --write    # and writes docs/dpo_performance.md
    python -m benchmarks.dpo --pairs=2 --prompt=8 --completion=8 --rounds=2

All take the same pairs and the same weights, in float32, and their steps take turns in one
process, so that a busy machine slows all of them. The log-probabilities of the first step are
compared. A library that cannot be imported is left out.
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
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.page import table
from benchmarks.peers import (
    ALPHA,
    RANK,
    RATE,
    trl_model,
    trl_settings,
    trl_update,
    tunix_policy,
    write_model,
)
from benchmarks.step import Contestant, memory

ROOT = Path(__file__).resolve().parents[1]
BETA = 0.1


@dataclasses.dataclass
class Entrant(Contestant):
    """A Contestant whose first step is checked.

    Attributes:
        measure: takes a step and returns (loss, mean log-probability of the chosen completions).
    """

    measure: Callable[[], tuple[float, float]] | None = None


def write_pairs(path: Path, options: argparse.Namespace) -> list[dict[str, list[int]]]:
    """Writes pairs as text and returns them as token ids, an end of text on each completion."""
    rng = np.random.default_rng(0)
    pairs = []
    with path.open("w") as file:
        for _ in range(options.pairs):
            sizes = (options.prompt, options.completion, options.completion)
            sides = [rng.integers(3, options.vocab, size) for size in sizes]
            texts = [" ".join(f"w{i - 3}" for i in ids) for ids in sides]
            line = {"prompt": texts[0], "chosen": f" {texts[1]}", "rejected": f" {texts[2]}"}
            file.write(json.dumps(line) + "\n")
            prompt, chosen, rejected = (ids.tolist() for ids in sides)
            pairs.append({"prompt": prompt, "chosen": [*chosen, 2], "rejected": [*rejected, 2]})
    return pairs


def product(model: Path, data: Path, options: argparse.Namespace, shared: bool) -> Entrant:
    """Returns jaxtune's own step; `shared`: both completions of a pair behind one prompt."""
    import jax

    from jaxtune.parallel.batches import global_batch
    from jaxtune.recipes.assemble import load_parts
    from jaxtune.recipes.build import build
    from jaxtune.recipes.schema.resolve import resolve
    from jaxtune.training.compile import fresh_state

    tail = options.completion + 1
    # Each branch repeats the last token of the prompt that it shares.
    width = options.prompt + 2 * tail + 1 if shared else 2 * (options.prompt + tail)
    config = {
        "model": {"path": str(model), "dtype": "float32"},
        "peft": {"method": "lora", "rank": RANK, "alpha": float(ALPHA)},
        "objective": {"name": "dpo", "beta": BETA},
        "data": {
            "train": [{"source": f"jsonl:{data}", "format": "preference"}],
            "seq_len": width,
            "packing": shared,
            "shuffle": False,
        },
        "batch_size": options.pairs,
        "total_steps": 1000,
        "optim": {"name": "adamw", "lr": RATE, "weight_decay": 0.0},
        "mesh": {"data": 1, "fsdp": 1},
    }
    plan = build(resolve(config))
    with jax.set_mesh(plan.mesh):
        params = load_parts(plan.base, plan.parts, plan.mesh, 0, None)
        trainable, frozen = plan.parts.split(params)
        state = fresh_state(trainable, plan.tx, 0, plan.layout)
        batches = plan.data.stream.batches(options.pairs, 1)
        host = next(iter(batches))
        targets = int((host["loss_mask"] > 0).sum())
        assert targets == 2 * options.pairs * tail, f"{targets} targets, not the pairs'"
        batch = global_batch(host, plan.mesh)
        started = time.perf_counter()
        compiled = plan.step.lower(state, frozen, batch).compile()
        seconds = time.perf_counter() - started

    def measure() -> tuple[float, float]:
        nonlocal state
        state, report = compiled(state, frozen, batch)
        return float(report["loss"]), float(report["logps/chosen"])

    name = "jaxtune, prompts shared" if shared else "jaxtune"
    return Entrant(name, lambda: measure()[0], seconds, memory(compiled), measure=measure)


def by_trl(model: Path, pairs: list[dict[str, list[int]]], scratch: Path) -> Entrant:
    """Returns a step of TRL's DPOTrainer with a PEFT LoRA: its own `training_step`, then AdamW."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    class Given(DPOTrainer):
        """Takes the token ids as they are."""

        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset

    rows = [{f"{side}_ids": ids for side, ids in pair.items()} for pair in pairs]
    trainer = Given(
        **trl_model(model),
        args=DPOConfig(
            **trl_settings(scratch / "trl"),
            per_device_train_batch_size=len(pairs),
            beta=BETA,
            max_length=None,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(model),
    )
    update = trl_update(trainer)

    def measure() -> tuple[float, float]:
        return update(), trainer._metrics["train"]["logps/chosen"][-1]

    return Entrant(f"TRL {version('trl')}", lambda: measure()[0], measure=measure)


def by_tunix(model: Path, pairs: list[dict[str, list[int]]]) -> Entrant:
    """Returns a step of Tunix's DPOTrainer with a Qwix LoRA, weights loaded by its own reader."""
    import jax
    import optax
    from tunix.sft.dpo import dpo_trainer

    mesh, base, policy = tunix_policy(model)
    with jax.set_mesh(mesh):
        trainer = dpo_trainer.DPOTrainer(
            model=policy,
            ref_model=base,
            optimizer=optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(RATE)),
            training_config=dpo_trainer.DPOTrainingConfig(
                eval_every_n_steps=10**6, max_steps=10**6, beta=BETA
            ),
        )
        step, _ = trainer.jit_train_and_eval_step()
    given = {}
    for side in ("prompt", "chosen", "rejected"):
        ids = np.array([pair[side] for pair in pairs], np.int32)
        given |= {f"{side}_ids": ids, f"{side}_mask": np.ones_like(ids)}
    batch = dpo_trainer.TrainingInput(**given)

    def measure() -> tuple[float, float]:
        with jax.set_mesh(mesh):
            loss, aux, _ = step(trainer._prepare_inputs(batch))
        return float(loss), float(aux["log_probs/chosen"])

    return Entrant(f"Tunix {version('google-tunix')}", lambda: measure()[0], measure=measure)


def contest(options: argparse.Namespace, scratch: Path) -> list[Entrant]:
    """Returns the entrants, timed.

    Raises:
        AssertionError: their first losses or log-probabilities differ.
    """
    model = write_model(scratch / "model", options)
    data = scratch / "pairs.jsonl"
    pairs = write_pairs(data, options)
    found = [product(model, data, options, shared) for shared in (False, True)]
    for make in (lambda: by_trl(model, pairs, scratch), lambda: by_tunix(model, pairs)):
        try:
            found.append(make())
        except ImportError as error:
            print(f"left out: {error}", file=sys.stderr)
    first = [one.measure() for one in found]
    np.testing.assert_allclose([loss for loss, _ in first], np.log(2), rtol=1e-5)
    np.testing.assert_allclose([x for _, x in first], first[0][1], rtol=1e-4)
    for number in range(options.rounds + 1):
        for one in found[number % len(found) :] + found[: number % len(found)]:
            one.time_step()
    for one in found:
        # The first is for caches and lazy set-up.
        del one.seconds[0], one.cpu_seconds[0]
    return found


HEADER = ("step", "median s", "fastest s", "CPU s", "jaxtune's time to it", "pairs/s", "compile s")


def rows_of(found: Sequence[Entrant], pairs: int) -> list[list[str]]:
    """Returns the rows of the table; the ratio is of jaxtune's first row to each, medians."""
    ours, rows = statistics.median(found[0].seconds), []
    for one in found:
        middle, cpu = statistics.median(one.seconds), statistics.median(one.cpu_seconds)
        rows.append(
            [
                one.name,
                f"{middle:.3f}",
                f"{min(one.seconds):.3f}",
                f"{cpu:.3f}",
                f"{ours / middle:.2f}",
                f"{pairs / middle:,.1f}",
                "" if one.compile_seconds is None else f"{one.compile_seconds:.1f}",
            ]
        )
    return rows


def page(body: str, argv: Sequence[str], options: argparse.Namespace) -> str:
    """Returns docs/dpo_performance.md."""
    from jaxtune.recipes.train import versions

    facts = {
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python -m benchmarks.dpo", *argv]),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPU cores",
        "load when it ended": f"{os.getloadavg()[0]:.1f}",
        "python": platform.python_version(),
        **versions(),
    }
    return "\n".join(
        [
            "# Speed of a DPO step\n",
            "Written by `benchmarks/dpo.py`; no figure is typed by hand.\n",
            table(["", "this page was made with"], [[k, f"`{v}`"] for k, v in facts.items()]),
            f"A Llama of {options.layers} layers, {options.width} wide, with a vocabulary of"
            f" {options.vocab:,}, random weights, float32; LoRA r = {RANK} on every linear layer;"
            f" {options.pairs} pairs a step, prompts of {options.prompt} tokens and completions of"
            f" {options.completion + 1}; the reference is the model without its adapter, run in"
            " every step; AdamW with clip 1.0. Steps take turns in one process. The ratio is"
            " jaxtune's median time, one prompt for each completion, over that of the row: below 1"
            " where jaxtune is faster. The first step's loss is ln 2 in all of them, and the mean"
            " log-probability of the chosen completions agrees to 1e-4, or there would be no table."
            " *TRL* is timed by its own `training_step` and AdamW, without its loop; *Tunix* by"
            " its jitted step with the preparation of its inputs, which runs the reference.\n",
            body,
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the contest and prints its table."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--prompt", type=int, default=96)
    parser.add_argument("--completion", type=int, default=63)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "dpo_performance.md")
    options = parser.parse_args(argv)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    with tempfile.TemporaryDirectory() as scratch:
        body = table(HEADER, rows_of(contest(options, Path(scratch)), options.pairs))
    print(body)
    if options.write:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(page(body, argv, options))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
