"""Prompts, the samples drawn of each, and what these were scored with."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxtune.data.batches import Batch, empty_batch, put_segment
from jaxtune.data.prompts import Prompts
from jaxtune.objectives.advantages import zero_variance
from jaxtune.rl.engine import Sample


class Prompt(NamedTuple):
    """One prompt.

    Attributes:
        ids: token ids as they are read, BOS and template included.
        text: for rewards and people.
        columns: the other fields of its record.
        place: where it stands in the data, for messages.
    """

    ids: Sequence[int]
    text: str
    columns: Mapping[str, Any]
    place: str


@dataclasses.dataclass(frozen=True)
class Group:
    """The samples of one prompt.

    Attributes:
        prompt: what they continue.
        samples: [n].
        texts: [n], as rewards saw them.
        rewards: float64 [n], the total; NaN: the sample is left out.
        by_function: {reward: float64 [n]}, before weighting; NaN: no score.
    """

    prompt: Prompt
    samples: Sequence[Sample]
    texts: Sequence[str]
    rewards: np.ndarray
    by_function: Mapping[str, np.ndarray]


# (prompts, seed of the draws) → their groups, in order
Draw = Callable[[Sequence[Prompt], int], list[Group]]


def prompts_at(prompts: Prompts, numbers: Sequence[int]) -> list[Prompt]:
    """Returns the prompts of these numbers."""
    columns = prompts.columns(numbers)
    return [
        Prompt(
            prompts.ids(number).tolist(),
            prompts.text(number),
            {name: values[i] for name, values in columns.items()},
            prompts.where(number),
        )
        for i, number in enumerate(numbers)
    ]


class Rounds:
    """Which prompts a round of an iteration reads, a function of the numbers of both.

    Each round has an order of its own, so that rounds which are needed now and then do not move
    the prompts of later iterations.
    """

    def __init__(self, prompts: Prompts) -> None:
        self._orders = [prompts]

    def take(self, iteration: int, count: int, round: int) -> list[Prompt]:
        """Returns `count` prompts."""
        first = self._orders[0]
        while len(self._orders) <= round:
            seed = seed_of(first.seed, len(self._orders))
            self._orders.append(dataclasses.replace(first, shuffle=True, seed=seed))
        return prompts_at(first, self._orders[round].take(iteration * count, count))


def seed_of(*numbers: int) -> int:
    """Returns a seed below 2³¹ that is made of numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0]) >> 1


def draw_varied(
    draw: Draw, order: Rounds, iteration: int, count: int, rounds: int, seed: int
) -> tuple[list[Group], dict[str, float]]:
    """Returns the groups of an iteration, and what is to be told of them.

    Dynamic sampling (DAPO, Yu et al. 2025, arXiv:2503.14476, eq. 11): a group whose rewards are
    all equal teaches nothing; the groups of further prompts take its place, for at most `rounds`
    more rounds of `count` prompts. What is then missing stays as it is.

    Args:
        draw: samples and scores prompts.
        order: of the prompts.
        iteration, count: which, and of how many prompts.
        rounds: 0: no group is replaced.
        seed: of the run.
    """

    def one(round: int) -> list[Group]:
        return draw(order.take(iteration, count, round), seed_of(seed, iteration, round))

    groups = first = one(0)
    flat = [bool(zero_variance(group.rewards[None])[0]) for group in groups]
    told = {"zero_variance": float(np.mean(flat))}
    if rounds == 0:
        return groups, told
    kept = [group for group, same in zip(groups, flat, strict=True) if not same]
    used = 0
    while len(kept) < count and used < rounds:
        used += 1
        kept += [g for g in one(used) if not zero_variance(g.rewards[None])[0]]
    rest = [group for group, same in zip(first, flat, strict=True) if same]
    missing = max(count - len(kept), 0)
    told |= {"resampled_rounds": float(used), "unreplaced": missing / count}
    return [*kept, *rest[:missing]][:count], told


def rows_of(groups: Sequence[Group], seq_len: int, num_virtual: int = 0) -> Batch:
    """Returns the padded rows [P · n, T], one a prompt and sample.

    Besides the keys of `data.batches`: `completions` int32, 1 on the sample's tokens, and
    `sampled_logprobs` float32, what the sampler said of each. `loss_mask` is 1 on the sample's
    tokens. A sample that is left out is no target.

    Args:
        groups: of as many samples each.
        seq_len: T; longer ones are the caller's error.
        num_virtual: slots before each prompt.
    """
    count = sum(len(group.samples) for group in groups)
    batch = empty_batch(count, seq_len, num_virtual)
    batch["completions"] = np.zeros((count, seq_len), np.int32)
    batch["sampled_logprobs"] = np.zeros((count, seq_len), np.float32)
    row = 0
    for group in groups:
        for sample, reward in zip(group.samples, group.rewards, strict=True):
            ids = np.array([*group.prompt.ids, *sample.ids], np.int32)
            target = np.zeros(len(ids), np.float32)
            target[len(group.prompt.ids) :] = not np.isnan(reward)
            put_segment(batch, row, 0, 1, ids, target, num_virtual)
            inside = slice(num_virtual + len(group.prompt.ids), num_virtual + len(ids))
            batch["completions"][row, inside] = target[len(group.prompt.ids) :]
            batch["sampled_logprobs"][row, inside] = sample.logprobs
            row += 1
    return batch
