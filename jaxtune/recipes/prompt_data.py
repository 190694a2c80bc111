"""Config → the prompts that an online objective writes completions to, and its rewards."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax

from jaxtune.core.errors import RequestError
from jaxtune.data.prompts import Prompts, PromptStore, read_prompts
from jaxtune.data.sources import open_source
from jaxtune.data.stream import Budget
from jaxtune.peft.method import Method
from jaxtune.recipes.base import Base
from jaxtune.recipes.data import Data
from jaxtune.recipes.load import load
from jaxtune.rl.rewards.named import build_rewards
from jaxtune.rl.rewards.reward import Reward, check_columns


@dataclasses.dataclass(frozen=True, eq=False)
class PromptStream(Prompts):
    """The prompts of a run, as `recipes.data.Data.stream`."""

    def stats(self) -> dict[str, Any]:
        """Returns counts of the sources."""
        return {
            "sources": [store.counts.as_dict() for store in self.stores],
            "prompts": len(self),
            "longest_prompt": self.longest,
        }


@dataclasses.dataclass(frozen=True)
class PromptData(Data):
    """The data of a run that samples: `stream` and `evals` are `PromptStream`s.

    Attributes:
        rewards: what completions are scored by.
        kept: what is made once for rollouts and evaluations: the engine.
    """

    rewards: tuple[Reward, ...] = ()
    kept: dict[str, Any] = dataclasses.field(default_factory=dict)


def open_prompts(config: Any, base: Base, method: Method) -> PromptData:
    """Returns the data of a resolved config; see `objective.Objective`.

    Raises:
        RequestError: a record is malformed or too long, a source is empty, a reward cannot be
            found or lacks a field of the records.
    """
    entries = config.objective.to_dict()["rewards"]
    rewards = build_rewards(entries, load_model=functools.partial(load, dtype=config.model.dtype))
    if base.tokenizer is None:
        raise RequestError(
            "missing: rewards read the completions as text, which needs a tokenizer",
            key="model.tokenizer",
        )

    def opened(entry: Any, key: str) -> PromptStore:
        return open_one(entry, config, base, method.num_virtual, key)

    data = config.data
    stores = [opened(entry, f"data.train[{i}]") for i, entry in enumerate(data.train)]
    stream = PromptStream(
        tuple(stores),
        tuple(entry.weight for entry in data.train),
        shuffle=data.shuffle,
        seed=config.seed,
    )
    evals = {
        entry.name: PromptStream((opened(entry, f"data.eval[{i}]"),), shuffle=False)
        for i, entry in enumerate(data.eval)
    }
    for prompts in (stream, *evals.values()):
        check_columns(rewards, prompts.names, prompts.stores[0].source.name)
    steps = config.total_steps
    ratio = round(config.optim.get("warmup_ratio", 0.0) * steps)
    warmup = config.optim.get("warmup_steps", ratio)
    return PromptData(stream, Budget(steps), warmup, evals, rewards=rewards)


def open_one(entry: Any, config: Any, base: Base, num_virtual: int, key: str) -> PromptStore:
    """Returns the tokenised prompts of one entry of `data.train` or `data.eval`."""
    room = config.data.seq_len - config.objective.max_new_tokens - num_virtual
    asked = config.data.max_prompt
    if asked is not None and asked > room:
        raise RequestError(
            f"{asked} is more than the {room} tokens that data.seq_len = {config.data.seq_len} "
            f"leaves beside objective.max_new_tokens = {config.objective.max_new_tokens}"
            + (f" and {num_virtual} virtual tokens" if num_virtual else ""),
            key="data.max_prompt",
        )
    return read_prompts(
        open_source(entry.source, key=f"{key}.source", lazily=jax.process_count() > 1),
        base.tokenizer,
        max_prompt=room if asked is None else asked,
        overlong=config.data.overlong,
        key=key,
    )
