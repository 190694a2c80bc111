"""What an objective is to a run: the data that it reads, and the loss of a batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from jaxtune.recipes.assemble import Parts
from jaxtune.training.step import SumLoss

# (resolved config, the model's partitions, over how many devices rows are spread) → loss
MakeLoss = Callable[[Any, Parts, int], SumLoss]


@dataclasses.dataclass(frozen=True)
class Objective:
    """One entry of `objectives.OBJECTIVES`.

    Attributes:
        trained: what training minimises.
        held_out: what evaluation measures.
        likelihood: whether the held-out loss is nats a token, so that it has a perplexity.
        at_start: of an objective with a reference, which is the policy at step 0: resolved
            `objective` section → the preference loss where both are one, None where the data
            decide it; see `recipes.reference`.
    """

    trained: MakeLoss
    held_out: MakeLoss
    likelihood: bool
    at_start: Callable[[Any], float | None] | None = None
