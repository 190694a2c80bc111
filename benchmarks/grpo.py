"""Time of a GRPO iteration with a LoRA beside TRL's GRPOTrainer.

    python -m benchmarks.grpo            # prints the table
    python -m benchmarks.grpo --write    # and writes docs/grpo_performance.md
    python -m benchmarks.grpo --tokens=4 --rounds=1 --width=64 --vocab=97 --layers=2

An iteration samples completions, scores them by a function, computes the log-probabilities of
reference and policy, and takes one step. Both libraries take the same prompts and the same weights,
in float32, and their iterations take turns in one process, so that a busy machine slows both. TRL
samples with transformers' `generate`; its server mode (vLLM) needs a GPU.
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
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.dpo import ALPHA, RANK, RATE, write_model
from benchmarks.page import table
from benchmarks.reference import LINEARS
from benchmarks.step import Contestant

ROOT = Path(__file__).resolve().parents[1]
KL = 0.04


@dataclasses.dataclass
class Entrant(Contestant):
    """A Contestant that tells what its latest iteration sampled.

    Attributes:
        told: {"length": mean tokens of a completion, "kl": from the reference, nats a token}.
    """

    told: dict[str, float] = dataclasses.field(default_factory=dict)


def even(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    """The share of words with an even number: the reward of both."""
    words = [text.split() for text in completions]
    return [sum(w[-1] in "02468" for w in some) / max(len(some), 1) for some in words]


def write_prompts(path: Path, options: argparse.Namespace) -> list[str]:
    """Writes prompts of words and returns them."""
    rng = np.random.default_rng(0)
    texts = [
        " ".join(f"w{i}" for i in rng.integers(0, options.vocab - 3, options.prompt))
        for _ in range(options.prompts)
    ]
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    return texts


def product(model: Path, data: Path, scratch: Path, options: argparse.Namespace) -> Entrant:
    """Returns jaxtune's iteration: what the loop of a run does in each."""
    import jax

    from jaxtune.parallel.batches import global_batch
    from jaxtune.recipes.build import build
    from jaxtune.recipes.schema import resolve
    from jaxtune.recipes.train import begin

    rows = options.prompts * options.samples
    config = {
        "model": {"path": str(model), "dtype": "float32"},
        "peft": {"method": "lora", "rank": RANK, "alpha": float(ALPHA)},
        "objective": {
            "name": "grpo",
            "rewards": [{"function": "benchmarks.grpo:even"}],
            "prompts": options.prompts,
            "samples": options.samples,
            "max_new_tokens": options.tokens,
            "kl_coef": KL,
        },
        "data": {
            "train": [{"source": f"jsonl:{data}", "format": "prompt"}],
            "seq_len": options.prompt + 1 + options.tokens,
        },
        "batch_size": rows,
        "total_steps": 1000,
        "optim": {"name": "adamw", "lr": RATE, "weight_decay": 0.0},
        "mesh": {"data": 1, "fsdp": 1},
    }
    plan = build(resolve(config))
    with jax.set_mesh(plan.mesh):
        begun = begin(plan, scratch / "run", allow_change=False)
        state, source = begun.state, plan.objective.open_feed(plan, begun, lambda _: None)

    def step() -> float:
        nonlocal state
        with jax.set_mesh(plan.mesh):
            batch, told = source.feed(state)
            state, report = plan.step(state, begun.frozen, global_batch(batch, plan.mesh))
            one.told.update(length=told["length"], kl=told["rollout_kl"])
            return float(report["loss"])

    one = Entrant("jaxtune", step)
    return one


def by_trl(model: Path, prompts: list[str], scratch: Path, options: argparse.Namespace) -> Entrant:
    """Returns an iteration of TRL's GRPOTrainer with a PEFT LoRA: `training_step`, then AdamW."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoTokenizer, LlamaForCausalLM
    from trl import GRPOConfig, GRPOTrainer

    trainer = GRPOTrainer(
        LlamaForCausalLM.from_pretrained(model, dtype=torch.float32),
        reward_funcs=[even],
        args=GRPOConfig(
            output_dir=str(scratch / "trl"),
            per_device_train_batch_size=options.prompts * options.samples,
            num_generations=options.samples,
            max_completion_length=options.tokens,
            beta=KL,
            loss_type="grpo",
            learning_rate=RATE,
            lr_scheduler_type="constant",
            optim="adamw_torch",
            bf16=False,
            gradient_checkpointing=False,
            use_cpu=True,
            report_to="none",
        ),
        train_dataset=Dataset.from_list([{"prompt": text} for text in prompts]),
        processing_class=AutoTokenizer.from_pretrained(model),
        peft_config=LoraConfig(
            r=RANK, lora_alpha=ALPHA, target_modules=list(LINEARS), task_type="CAUSAL_LM"
        ),
    )
    trainer.create_optimizer_and_scheduler(1000)
    trainer.current_gradient_accumulation_steps = 1
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.model.train()

    def step() -> float:
        loss = trainer.training_step(trainer.model, batch, None)
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
        found = trainer._metrics["train"]
        one.told.update(length=found["completions/mean_length"][-1], kl=found["kl"][-1])
        return loss.item()

    one = Entrant(f"TRL {version('trl')}", step)
    return one


def contest(options: argparse.Namespace, scratch: Path) -> list[Entrant]:
    """Returns the entrants, timed.

    Raises:
        AssertionError: they did not begin at their reference, or one wrote much less.
    """
    model = write_model(scratch / "model", options)
    data = scratch / "prompts.jsonl"
    prompts = write_prompts(data, options)
    found = [product(model, data, scratch, options)]
    try:
        found.append(by_trl(model, prompts, scratch, options))
    except ImportError as error:
        print(f"left out: {error}", file=sys.stderr)
    for one in found:
        one.step()
        assert abs(one.told["kl"]) < 1e-6, f"{one.name} does not begin at its reference"
        # An untrained model ends a completion once in as many tokens as the vocabulary has.
        assert one.told["length"] > 0.9 * options.tokens, f"{one.name}: {one.told}"
    for number in range(options.rounds + 1):
        for one in found[number % len(found) :] + found[: number % len(found)]:
            one.time_step()
    for one in found:
        # The first is for caches and lazy set-up.
        del one.seconds[0], one.cpu_seconds[0]
    return found


HEADER = ("iteration", "median s", "fastest s", "CPU s", "jaxtune's time to it", "tokens/s")


def rows_of(found: Sequence[Entrant], count: int) -> list[list[str]]:
    """Returns the rows of the table; the ratio is of jaxtune's median to each.

    Args:
        found: the entrants.
        count: completions of an iteration.
    """
    ours, rows = statistics.median(found[0].seconds), []
    for one in found:
        middle, cpu = statistics.median(one.seconds), statistics.median(one.cpu_seconds)
        figures = (f"{middle:.2f}", f"{min(one.seconds):.2f}", f"{cpu:.2f}", f"{ours / middle:.2f}")
        rows.append([one.name, *figures, f"{count * one.told['length'] / middle:,.0f}"])
    return rows


def page(body: str, argv: Sequence[str], options: argparse.Namespace) -> str:
    """Returns docs/grpo_performance.md."""
    from jaxtune.recipes.versions import versions

    facts = {
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python -m benchmarks.grpo", *argv]),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPU cores",
        "load when it ended": f"{os.getloadavg()[0]:.1f}",
        "python": platform.python_version(),
        **versions(),
    }
    return "\n".join(
        [
            "# Speed of a GRPO iteration\n",
            "Written by `benchmarks/grpo.py`; no figure is typed by hand.\n",
            table(["", "this page was made with"], [[k, f"`{v}`"] for k, v in facts.items()]),
            f"A Llama of {options.layers} layers, {options.width} wide, with a vocabulary of"
            f" {options.vocab:,}, random weights, float32; LoRA r = {RANK} on every linear layer;"
            f" {options.prompts} prompts of {options.prompt} tokens, {options.samples} samples of"
            f" each, at most {options.tokens} tokens; a KL from the model without its adapter in"
            f" the loss ({KL:g}, k3); one AdamW step on all of them. An iteration is sampling, a"
            " reward function, log-probabilities of policy and reference, and the step; iterations"
            " take turns in one process, after one that compiles. The ratio is jaxtune's median"
            " time over that of the row: below 1 where jaxtune is faster. *Tokens/s* are sampled"
            " tokens over the whole iteration. *TRL* samples with transformers' `generate`, and is"
            " timed by its own `training_step` and AdamW, without its loop; jaxtune also compares"
            " sampler and trainer. Tunix's iteration is not measured.\n",
            body,
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the contest and prints its table."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for key, value in {
        **{"layers": 4, "width": 256, "vocab": 8192, "prompts": 8, "samples": 8, "tokens": 64},
        **{"prompt": 32, "rounds": 5},
    }.items():
        parser.add_argument(f"--{key}", type=int, default=value)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "grpo_performance.md")
    options = parser.parse_args(argv)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    with tempfile.TemporaryDirectory() as scratch:
        found = contest(options, Path(scratch))
    body = table(HEADER, rows_of(found, options.prompts * options.samples))
    print(body)
    if options.write:
        options.out.write_text(page(body, argv, options))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
