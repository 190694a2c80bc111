"""The entrants of `benchmarks.rl`: an iteration of GRPO by jaxtune, TRL and Tunix."""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers import (
    ALPHA,
    RANK,
    RATE,
    trl_model,
    trl_settings,
    trl_update,
    tunix_policy,
)
from benchmarks.step import Contestant

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
    from jaxtune.recipes.schema.resolve import resolve
    from jaxtune.recipes.train import begin

    data = at / "prompts.jsonl"
    data.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in prompts))
    rows = options.prompts * options.samples
    config = {
        "model": {"path": str(model), "dtype": "float32"},
        "peft": {"method": "lora", "rank": RANK, "alpha": float(ALPHA)},
        "objective": {
            "name": "grpo",
            "rewards": [{"function": "benchmarks.rl_entrants:even"}],
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
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    trainer = GRPOTrainer(
        **trl_model(model),
        reward_funcs=even,
        args=GRPOConfig(
            **trl_settings(at / "trl"),
            per_device_train_batch_size=options.prompts * options.samples,
            num_generations=options.samples,
            max_completion_length=options.tokens,
            beta=KL,
            loss_type="grpo",
            temperature=1.0,
            top_p=1.0,
            top_k=0,
            shuffle_dataset=False,
        ),
        train_dataset=Dataset.from_list([{"prompt": text} for text in prompts]),
        processing_class=AutoTokenizer.from_pretrained(model, padding_side="left"),
    )
    sampling: list[float] = []
    trainer._generate_single_turn = timed(trainer._generate_single_turn, sampling)
    return Entrant(f"TRL {version('trl')}", trl_update(trainer), sampling=sampling)


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
    width = options.prompt + 1  # its sampler begins with BOS
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
                    max_prompt_length=width,
                    kv_cache_size=width + options.tokens,
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
