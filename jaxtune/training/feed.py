"""Where the batches of a run come from."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from jaxtune.training.state import TrainState

# What gives the next batch: the state before the step → (host batch, metrics to log with the step).
Feed = Callable[[TrainState], tuple[dict[str, np.ndarray], dict[str, float]]]


@dataclasses.dataclass(frozen=True)
class Source:
    """A feed with what a checkpoint needs to go on in the middle of it.

    Attributes:
        feed: gives the batches.
        arrays: returns {path: array} to save after the step that was fed last; nothing where the
            step alone says what comes next. All processes return the same.
    """

    feed: Feed
    arrays: Callable[[], dict[str, np.ndarray]] = dict
