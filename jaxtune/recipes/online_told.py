"""What is told of rollouts: metrics, completions to read, and what `--dry_run` shows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.console import Console

from jaxtune.rl.groups import Group, prompts_at

KL_COEF = "kl_coef"
SHOWN = 4  # completions of an iteration that are written to samples.jsonl
SAMPLED = ("reward", "reward/std", "length", "truncated", "dropped")
FED = (
    "iteration",
    "zero_variance",
    "sampler_gap",
    "sampler_gap/max",
    "sampler_gap/k3",
    "sampling_seconds",
)


def sample_metrics(groups: Sequence[Group], prefix: str = "") -> dict[str, float]:
    """Returns rewards, lengths and shares of some groups' samples, means over the samples.

    `reward` and `reward/std` are of the total over the samples that have one.
    """
    samples = [sample for group in groups for sample in group.samples]
    rewards = np.concatenate([group.rewards for group in groups])
    scored = rewards[~np.isnan(rewards)]
    found = {
        "reward": float(scored.mean()) if scored.size else 0.0,
        "reward/std": float(scored.std()) if scored.size else 0.0,
        "length": float(np.mean([len(sample.ids) for sample in samples])),
        "truncated": float(np.mean([not sample.finished for sample in samples])),
        "dropped": 1.0 - scored.size / len(rewards),
    }
    for name in groups[0].by_function:
        values = np.concatenate([group.by_function[name] for group in groups])
        values = values[~np.isnan(values)]
        if values.size:
            found[f"reward/{name}"] = float(values.mean())
    return {f"{prefix}{name}": value for name, value in found.items()}


def shown(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """Returns what `samples.jsonl` shows of an iteration: the first samples of some groups."""
    step = max(1, len(groups) // SHOWN)
    out = []
    for number, group in enumerate(groups[::step][:SHOWN]):
        scores = {name: float(values[0]) for name, values in group.by_function.items()}
        out.append(
            {
                "number": number,
                "prompt": group.prompt.text,
                "completion": group.texts[0],
                "reward": float(group.rewards[0]),
                "rewards": scores,
                "tokens": len(group.samples[0].ids),
                "finished": group.samples[0].finished,
            }
        )
    return out


def names(plan: Any) -> set[str]:
    """Returns the names of the metrics of rollouts and of evaluations that every run has."""
    of_samples = [*SAMPLED, *(f"reward/{reward.name}" for reward in plan.data.rewards)]
    sources = [f"{name}/" for name in plan.data.evals] if len(plan.data.evals) > 1 else []
    held = ["", *sources] if plan.data.evals else []
    reference = ("rollout_kl", "rollout_kl/completion", KL_COEF)
    return {
        *FED,
        *of_samples,
        *(reference if plan.config.objective.kl_coef else ()),
        *(f"eval/{source}{name}" for source in held for name in of_samples),
    }


def show(plan: Any, count: int, console: Console) -> None:
    """Prints the first prompts and what completions are scored by."""
    stream = plan.data.stream
    for prompt in prompts_at(stream, stream.take(0, count)):
        console.rule(f"{prompt.place}, {len(prompt.ids)} tokens", align="left")
        console.print(prompt.text, markup=False, highlight=False)
    for reward in plan.data.rewards:
        console.print(f"reward {reward.name}, weight {reward.weight:g}", highlight=False)
