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

from benchmarks import generation
from benchmarks.page import table
from benchmarks.peers import ALPHA, RANK, RATE, tunix_policy, write_model
from benchmarks.reference import LINEARS
from benchmarks.step import Contestant

ROOT = Path(__file__).resolve().parents[1]
KL = 0.04


@dataclasses.dataclass
class Entrant(Contestant):
    """A Contestant whose step is an iteration.

    Attributes:
        sampling: seconds of each call of its sampler.
    """

    sampling: list[float] = dataclasses.field(default_factory=list)


def even(prompts: Sequence[str], completions: Sequence[str], **_: Any) -> list[float]:
    """The reward of all entrants: the share of words with an even number."""
    numbers = [[int(w[1:]) for w in text.split() if w[1:].isdigit()] for text in completions]
    return [sum(n % 2 == 0 for n in some) / max(len(some), 1) for some in numbers]


def timed(function: Callable, seconds: list[float]) -> Callable:
    """Returns the function; each call appends its time to `seconds`."""

    def run(*args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        found = function(*args, **kwargs)
        seconds.append(time.perf_counter() - started)
        return found

    return run


def texts(options: argparse.Namespace) -> list[str]:
    """Returns the prompts, `options.prompt` words each."""
    rng = np.random.default_rng(0)
    shape = (options.prompts, options.prompt)
    return [" ".join(f"w{i}" for i in row) for row in rng.integers(0, options.vocab - 3, shape)]


def product(model: Path, prompts: Sequence[str], options: argparse.Namespace, at: Path) -> Entrant:
    """Returns jaxtune's iteration: sampling, rewards, the trainer's pass over them, the step."""
    import jax

    from jaxtune.parallel.batches import global_batch
    from jaxtune.recipes.build import build
    from jaxtune.recipes.engines import open_engine
    from jaxtune.recipes.schema import resolve
    from jaxtune.recipes.train import begin

    data = at / "prompts.jsonl"
    data.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in prompts))
    rows = options.prompts * options.samples
    config = {
        "model": {"path": str(model), "dtype": "float32"},
        "peft": {"method": "lora", "rank": RANK, "alpha": float(ALPHA)},
        "objective": {
            "name": "grpo",
            "rewards": [{"function": "benchmarks.rl:even"}],
            "prompts": options.prompts,
            "samples": options.samples,
            "max_new_tokens": options.tokens,
            "slots": rows,
            "kl_coef": KL,
        },
        "data": {
            "train": [{"source": f"jsonl:{data}", "format": "prompt"}],
            "seq_len": options.prompt + options.tokens,
            "shuffle": False,
        },
        "batch_size": rows,
        "total_steps": 1000,
        "optim": {"name": "adamw", "lr": RATE, "weight_decay": 0.0},
        "mesh": {"data": 1, "fsdp": 1},
    }
    plan = build(resolve(config))
    begun = begin(plan, at / "run", False)
    engine, sampling = open_engine(plan), []
    engine.sample = timed(engine.sample, sampling)
    with jax.set_mesh(plan.mesh):
        feed = plan.objective.open_feed(plan, begun, lambda _: None).feed
        shapes = plan.abstract_arguments()
        started = time.perf_counter()
        compiled = plan.step.lower(*shapes).compile()
        seconds = time.perf_counter() - started
    state = begun.state

    def step() -> float:
        nonlocal state
        with jax.set_mesh(plan.mesh):
            host, _ = feed(state)
            state, report = compiled(state, begun.frozen, global_batch(host, plan.mesh))
        return float(report["loss"])

    return Entrant("jaxtune", step, seconds, sampling=sampling)


def by_trl(model: Path, prompts: Sequence[str], options: argparse.Namespace, at: Path) -> Entrant:
    """Returns an iteration of TRL's GRPOTrainer with a PEFT LoRA: its `training_step`, AdamW."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoTokenizer, LlamaForCausalLM
    from trl import GRPOConfig, GRPOTrainer

    trainer = GRPOTrainer(
        LlamaForCausalLM.from_pretrained(model, dtype=torch.float32),
        reward_funcs=even,
        args=GRPOConfig(
            output_dir=str(at / "trl"),
            per_device_train_batch_size=options.prompts * options.samples,
            num_generations=options.samples,
            max_completion_length=options.tokens,
            beta=KL,
            loss_type="grpo",
            temperature=1.0,
            top_p=1.0,
            top_k=0,
            learning_rate=RATE,
            lr_scheduler_type="constant",
            optim="adamw_torch",
            shuffle_dataset=False,
            bf16=False,
            gradient_checkpointing=False,
            use_cpu=True,
            report_to="none",
        ),
        train_dataset=Dataset.from_list([{"prompt": text} for text in prompts]),
        processing_class=AutoTokenizer.from_pretrained(model, padding_side="left"),
        peft_config=LoraConfig(
            r=RANK, lora_alpha=ALPHA, target_modules=list(LINEARS), task_type="CAUSAL_LM"
        ),
    )
    trainer.create_optimizer_and_scheduler(1000)
    trainer.current_gradient_accumulation_steps = 1
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    batch = next(iter(trainer.get_train_dataloader()))
    sampling: list[float] = []
    trainer._generate_single_turn = timed(trainer._generate_single_turn, sampling)

    def step() -> float:
        trainer.model.train()
        loss = trainer.training_step(trainer.model, batch, None)
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
        return loss.item()

    return Entrant(f"TRL {version('trl')}", step, sampling=sampling)


def by_tunix(model: Path, prompts: Sequence[str], options: argparse.Namespace) -> Entrant:
    """Returns an iteration of Tunix's GRPOLearner with a Qwix LoRA and its own sampler."""
    import jax
    import optax
    from transformers import AutoTokenizer
    from tunix.rl import rl_cluster
    from tunix.rl.grpo import grpo_learner
    from tunix.rl.rollout import base_rollout

    mesh, base, policy = tunix_policy(model)
    roles = (rl_cluster.Role.ACTOR, rl_cluster.Role.REFERENCE, rl_cluster.Role.ROLLOUT)
    room = options.prompt + options.tokens
    with jax.set_mesh(mesh):
        cluster = rl_cluster.RLCluster(
            actor=policy,
            reference=base,
            tokenizer=AutoTokenizer.from_pretrained(model),
            cluster_config=rl_cluster.ClusterConfig(
                role_to_mesh=dict.fromkeys(roles, mesh),
                rollout_engine="vanilla",
                training_config=rl_cluster.RLTrainingConfig(
                    actor_optimizer=optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(RATE)),
                    eval_every_n_steps=10**6,
                    max_steps=10**6,
                    mini_batch_size=options.prompts,
                    train_micro_batch_size=options.prompts,
                ),
                rollout_config=base_rollout.RolloutConfig(
                    max_tokens_to_generate=options.tokens,
                    max_prompt_length=options.prompt,
                    kv_cache_size=room,
                    temperature=1.0,
                    top_p=1.0,
                    top_k=None,
                ),
            ),
        )
        learner = grpo_learner.GRPOLearner(
            rl_cluster=cluster,
            algo_config=grpo_learner.GRPOConfig(num_generations=options.samples, beta=KL),
            reward_fns=even,
        )
    # `train` closes its logs when its data end, which here they do after each iteration.
    cluster.close = lambda: None
    sampling: list[float] = []
    cluster.generate = timed(cluster.generate, sampling)

    def step() -> float:
        with jax.set_mesh(mesh):
            learner.train([{"prompts": np.array(prompts)}])
            jax.block_until_ready(jax.tree.leaves(policy))
        return 0.0

    return Entrant(f"Tunix {version('google-tunix')}", step, sampling=sampling)


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
    for number in range(options.rounds + 1):
        for one in found[number % len(found) :] + found[: number % len(found)]:
            one.time_step()
    for one in found:
        assert len(one.sampling) == options.rounds + 1, f"{one.name}: {len(one.sampling)} samplings"
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


def page(bodies: Sequence[str], argv: Sequence[str], options: argparse.Namespace) -> str:
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
            f" with clip 1.0 over all samples; {options.rounds} iterations each after one that"
            " compiles. The ratio is jaxtune's median time over that of the row: below 1 where"
            " jaxtune is faster. *Sampling* is the sampler's part of the iteration. jaxtune's"
            " iteration includes a pass of the trainer over the samples, which the others leave out"
            " with one step an iteration: it compares the log-probabilities with the sampler's and"
            " stops the run where they differ. *TRL* is timed by its own `training_step`, which"
            " samples with transformers, and AdamW; *Tunix* by its learner's `train` on one batch."
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
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "rl_performance.md")
    options = parser.parse_args(argv)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    with tempfile.TemporaryDirectory() as scratch:
        tokens = options.prompts * options.samples * options.tokens
        bodies = [
            table(HEADER, rows_of(contest(options, Path(scratch)), tokens)),
            table(generation.HEADER, sampling_rows(options, Path(scratch))),
        ]
    print("\n".join(bodies))
    if options.write:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(page(bodies, argv, options))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
