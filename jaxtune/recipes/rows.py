"""What is known of the rows of a batch before they are made, and decides the compiled program."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from jaxtune.data.batches import most_completions, most_targets
from jaxtune.data.stream import Stream


@dataclasses.dataclass(frozen=True)
class Rows:
    """Facts of a run's rows.

    Attributes:
        shards: over how many devices the rows of a batch are spread.
        targets: a number that the targets of a row never exceed; None: not known.
        completions: the same of its completions.
    """

    shards: int
    targets: int | None = None
    completions: int | None = None

    def most_completions(self, least: int, tokens: int) -> int:
        """Returns how many completions a row may hold.

        Args:
            least: tokens that each needs, for rows of which nothing else is known.
            tokens: of a row.
        """
        return self.completions or max(1, tokens // least)


UNKNOWN = Rows(1)  # of rows that anything may stand in


def rows_of(data: Any, shards: int, num_virtual: int) -> Rows:
    """Returns the Rows of a run's training, evaluation and mismatched data, one for all of them.

    Args:
        data: a `recipes.data.Data`, or of an objective that samples; its stream may be None.
        shards: as of `Rows`.
        num_virtual: prompt-tuning slots before each segment.
    """
    parts = [part for part in (data, getattr(data, "mismatched", None)) if part is not None]
    if not all(isinstance(part.stream, Stream) for part in parts):  # planned, or yet to be sampled
        return Rows(shards)
    found = [alone(part.evals.values(), shards, part.stream.seq_len, num_virtual) for part in parts]
    found += [Rows(shards, p.stream.most_targets, p.stream.most_completions) for p in parts]
    return Rows(shards, max(r.targets for r in found), max(r.completions for r in found))


def alone(stores: Iterable[Any], shards: int, seq_len: int, num_virtual: int) -> Rows:
    """Returns the Rows of stores of which each example has a row of `seq_len` tokens to itself."""
    known = tuple(stores), seq_len, False, num_virtual
    return Rows(shards, most_targets(*known), most_completions(*known))
