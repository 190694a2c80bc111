"""Prompts, the samples drawn of each, and what these were scored with."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxtune.data.batches import Batch, empty_batch, put_segment
from jaxtune.data.order import Order
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
        faults: what went wrong with rewards, a line each.
    """

    prompt: Prompt
    samples: Sequence[Sample]
    texts: Sequence[str]
    rewards: np.ndarray
    by_function: Mapping[str, np.ndarray]
    faults: Sequence[str] = ()


# (prompts, seed of the draws) → their groups, in order
Draw = Callable[[Sequence[Prompt], int], list[Group]]


class PromptOrder:
    """Which prompts an iteration reads: every pass over the data is in a new order.

    Args:
        sizes, weights: of the sources; see `data.order.Order`.
        prompt: (source, number) → the prompt.
        shuffle, seed: of the order.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        weights: Sequence[float],
        prompt: Callable[[int, int], Prompt],
        *,
        shuffle: bool,
        seed: int,
    ) -> None:
        self._sizes, self._weights, self._prompt = sizes, weights, prompt
        self._shuffle, self._seed = shuffle, seed
        self._orders: dict[int, Order] = {}

    def take(self, iteration: int, count: int, round: int) -> list[Prompt]:
        """Returns the prompts of a round of an iteration, a function of the three numbers.

        Each round has an order of its own, so that rounds which are needed now and then do not
        move the prompts of later iterations.
        """
        if round not in self._orders:
            seed = (
                self._seed
                if round == 0
                else int(np.random.SeedSequence([self._seed, round]).generate_state(1)[0])
            )
            self._orders[round] = Order(
                self._sizes, self._weights, shuffle=self._shuffle or round > 0, seed=seed
            )
        order = self._orders[round]
        numbers = order.examples(iteration * count, (iteration + 1) * count)
        sources = np.searchsorted(order.bases, numbers, side="right") - 1
        return [
            self._prompt(int(s), int(n - order.bases[s]))
            for s, n in zip(sources, numbers, strict=True)
        ]


def draw_varied(
    draw: Draw, order: PromptOrder, iteration: int, count: int, rounds: int, seed: int
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
        numbers = np.random.SeedSequence([seed, iteration, round]).generate_state(1)
        return draw(order.take(iteration, count, round), int(numbers[0]) >> 1)

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
