"""What the outer loops of reinforcement learning ask of whatever draws their samples."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol

from jaxtune.core.tree import Tree
from jaxtune.generate.sampler import Sample

__all__ = ["Engine", "Sample", "Sampling"]


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How samples are drawn.

    Attributes:
        max_new_tokens: the most tokens of a sample, its eos included.
        temperature: divides the logits.
        top_p: keeps the likeliest tokens that reach this probability together; 1 keeps all.
        top_k: keeps so many likeliest tokens; 0 keeps all.
        eos_ids: ids that end a sample.
        stop: texts that end a sample with the token that completes them.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    eos_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()


class Engine(Protocol):
    """Draws samples from the policy. On several processes, each makes every call and gets all."""

    def update(self, params: Tree) -> None:
        """Takes the policy's weights for the samples to come: trainable and frozen, combined."""

    def sample(
        self, prompts: Sequence[Sequence[int]], count: int, sampling: Sampling, seed: int
    ) -> list[list[Sample]]:
        """Returns `count` samples of each prompt, [prompt][count].

        Args:
            prompts: token ids, as they are to be read, BOS and template included.
            count: samples a prompt.
            sampling: how they are drawn.
            seed: of the draws; one sample is a function of the weights, its prompt's ids, its place
                and the seed.

        Raises:
            RequestError: what the engine cannot do, in one line.
        """
