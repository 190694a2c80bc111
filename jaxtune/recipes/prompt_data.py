"""Config → the prompts that an online objective writes completions to."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any

from jaxtune.core.errors import RequestError
from jaxtune.data.sources import open_source
from jaxtune.data.stream import Budget
from jaxtune.recipes.base import Base
from jaxtune.recipes.data import Data
from jaxtune.rl.groups import Prompt, PromptOrder
from jaxtune.rl.rewards.named import build_rewards
from jaxtune.rl.rewards.reward import Reward, check_columns


@dataclasses.dataclass(frozen=True)
class Prompts:
    """The prompts of `data.train`, in the order in which iterations read them.

    Attributes:
        stores: tokenised sources.
        weights: proportion in which prompts of each are read.
        order: which prompts an iteration has.
        shuffle, seed: of the order.
    """

    stores: tuple[Any, ...]
    weights: tuple[float, ...]
    order: PromptOrder
    shuffle: bool
    seed: int

    def stats(self) -> dict[str, Any]:
        """Returns counts of the sources."""
        return {
            "sources": [store.counts.as_dict() for store in self.stores],
            "prompts": sum(len(store) for store in self.stores),
        }

    def fingerprint(self) -> str:
        """Returns a hash of everything that decides the prompts, in hexadecimal."""
        facts = [
            [store.fingerprint() for store in self.stores],
            list(self.weights),
            [self.shuffle, self.seed],
        ]
        return hashlib.blake2b(json.dumps(facts).encode(), digest_size=16).hexdigest()


@dataclasses.dataclass(frozen=True)
class PromptData(Data):
    """The data of a run that samples: `stream` is `Prompts`, `evals` are stores of prompts.

    Attributes:
        rewards: what completions are scored by.
    """

    rewards: tuple[Reward, ...] = ()


def prompt_at(store: Any, index: int) -> Prompt:
    """Returns a prompt of a store."""
    return Prompt(
        store.prompt_ids(index), store.text(index), store.fields(index), store.where(index)
    )


def open_prompts(config: Any, base: Base, num_virtual: int) -> PromptData:
    """Returns the data of a resolved config; see `objective.Objective`.

    Raises:
        RequestError: a record is malformed or too long, a source is empty, a reward cannot be
            found or lacks a field of the records.
    """
    rewards = build_rewards(config.objective.to_dict()["rewards"])
    if base.tokenizer is None:
        raise RequestError(
            "missing: rewards read the completions as text, which needs a tokenizer",
            key="model.tokenizer",
        )
    stores = [
        open_one(entry, config, base, num_virtual, rewards, f"data.train[{i}]")
        for i, entry in enumerate(config.data.train)
    ]
    evals = {
        entry.name: open_one(entry, config, base, num_virtual, rewards, f"data.eval[{i}]")
        for i, entry in enumerate(config.data.eval)
    }
    weights = tuple(entry.weight for entry in config.data.train)
    order = PromptOrder(
        [len(store) for store in stores],
        weights,
        lambda source, number: prompt_at(stores[source], number),
        shuffle=config.data.shuffle,
        seed=config.seed,
    )
    stream = Prompts(tuple(stores), weights, order, config.data.shuffle, config.seed)
    steps = config.total_steps
    ratio = round(config.optim.get("warmup_ratio", 0.0) * steps)
    warmup = config.optim.get("warmup_steps", ratio)
    return PromptData(stream, Budget(steps), warmup, evals, rewards)


def open_one(
    entry: Any,
    config: Any,
    base: Base,
    num_virtual: int,
    rewards: tuple[Reward, ...],
    key: str,
) -> Any:
    """Returns the tokenised prompts of one entry of `data.train` or `data.eval`."""
    source = open_source(entry.source, key=f"{key}.source")
    room = config.data.seq_len - config.objective.max_new_tokens - num_virtual
    ids = [base.tokenizer.encode(source[i]["prompt"]) for i in range(len(source))]
    check_columns(rewards, set(source[0]) - {"prompt"}, source.name)
    for i, one in enumerate(ids):
        if len(one) > room:
            raise RequestError(
                f"the prompt has {len(one)} tokens, more than {room}", where=source.where(i)
            )
    return StandIn(source, ids)


@dataclasses.dataclass
class StandIn:
    source: Any
    ids: list

    def __len__(self):
        return len(self.ids)

    def prompt_ids(self, index):
        return self.ids[index]

    def text(self, index):
        return self.source[index]["prompt"]

    def fields(self, index):
        return {k: v for k, v in self.source[index].items() if k != "prompt"}

    def where(self, index):
        return self.source.where(index)

    def fingerprint(self):
        return hashlib.blake2b(json.dumps(self.ids).encode(), digest_size=16).hexdigest()

    @property
    def counts(self):
        return self

    def as_dict(self):
        return {"records": len(self.ids)}
