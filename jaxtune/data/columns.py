"""What is known of each token beside its id and mask, and how much room examples take in a row.

A batch key of these stands on every token that it belongs to, 0 elsewhere:

- `completions` int32: which completion of the row the token is a target of, 1, 2, ... counting on
  over the examples of a row; 0 where it is no target. Completions 2k - 1 and 2k are chosen and
  rejected of pair k. In judged answers each step counts as one.
- `groups` int32, where ranked lists are: which list of the row, 1, 2, ...; its completions follow
  one another, the best first. A pair is a list of two.
- `branches` int32, where prompts are shared: 0 on the prompt, 1, 2, ... on its completions, each of
  which begins with a copy of the prompt's last token. A token sees the keys of its segment whose
  branch is 0 or its own.
- `example_weight` float32: of the example, on its targets.
- `margin` float32: of the pair or list, on its targets.
- `label` float32: of an unpaired completion on its targets, of a step on its last token.
- `ref_logprobs` float32: the token's log-probability under the reference; see `with_column`.
- `teacher_rows` int32: where a table of a teacher's has the target, from 1; not for the model.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

DTYPES: Mapping[str, type] = {
    "completions": np.int32,
    "groups": np.int32,
    "branches": np.int32,
    "example_weight": np.float32,
    "margin": np.float32,
    "label": np.float32,
    "ref_logprobs": np.float32,
    "teacher_rows": np.int32,
}
# Keys of the examples of a format; those of the other formats have none.
KEYS: Mapping[str, tuple[str, ...]] = {
    "preference": ("completions", "example_weight", "margin"),
    "ranked": ("completions", "groups", "example_weight", "margin"),
    "unpaired": ("completions", "example_weight", "label"),
    "stepwise": ("completions", "example_weight", "label"),
}
# Formats whose examples are a prompt and completions that may share it.
BRANCHED = ("preference", "ranked")


def example_columns(
    format: str, mask: np.ndarray, columns: Mapping[str, np.ndarray], values: Mapping[str, float]
) -> dict[str, np.ndarray]:
    """Returns the columns [n] of an example, numbered from 1 as if it were alone in its row.

    Args:
        format: of the example, a key of `KEYS`.
        mask: float32 [n].
        columns: what is kept a token.
        values: what is kept an example.
    """
    trained = mask > 0
    if format in BRANCHED:
        completions = np.where(trained, columns["branches"], 0)
    elif format == "stepwise":
        completions = np.where(trained, np.cumsum(trained), 0)
    else:
        completions = trained
    out = {"completions": completions.astype(np.int32)}
    if format in BRANCHED:
        out["groups"] = trained.astype(np.int32)
    for name, value in values.items():
        out[name] = np.where(trained, np.float32(value), np.float32(0))
    return out | columns


class Segment(NamedTuple):
    """One segment of a row, as an example is written into it.

    Attributes:
        places: which token of the example stands at each place, int [m].
        branches: int32 [m], where completions share a prompt; else None.
        positions: int [m].
    """

    places: np.ndarray | slice
    branches: np.ndarray | None
    positions: np.ndarray


def segments(branches: np.ndarray | None, size: int, shared: bool) -> list[Segment]:
    """Returns the segments that an example is written as, in order.

    Completions that share their prompt are one segment; else each is one, behind a copy of the
    prompt. Of a shared prompt the last token is written once in front of each completion, as the
    first token of its branch: so every target stands behind the token that predicts it.

    Args:
        branches: int32 [n] of the example, ascending from 0, or None where it has none.
        size: n.
        shared: whether completions share their prompt.
    """
    if branches is None:
        return [Segment(slice(0, size), None, np.arange(size))]
    bounds = np.searchsorted(branches, np.arange(branches[-1] + 2))
    prompt = np.arange(bounds[1])
    kept = prompt[:-1] if shared else prompt
    sides = [
        np.concatenate([prompt[len(kept) :], np.arange(start, end)])
        for start, end in itertools.pairwise(bounds[1:])
    ]
    if not shared:
        whole = [np.concatenate([prompt, side]) for side in sides]
        return [Segment(places, None, np.arange(len(places))) for places in whole]
    lengths = [len(side) for side in sides]
    numbers = np.repeat(np.arange(1, len(sides) + 1, dtype=np.int32), lengths)
    return [
        Segment(
            np.concatenate([kept, *sides]),
            np.concatenate([np.zeros(len(kept), np.int32), numbers]),
            np.concatenate([kept, *(len(kept) + np.arange(n) for n in lengths)]),
        )
    ]


def room(
    lengths: np.ndarray, prompts: np.ndarray, sides: np.ndarray, shared: bool, num_virtual: int
) -> np.ndarray:
    """Returns how many tokens of a row each example takes, virtual ones included, int64 [examples].

    Args:
        lengths: int [examples], tokens, the prompt counted once.
        prompts: int [examples], tokens of the prompt that completions may share.
        sides: int [examples], how many completions may share it; 1 where nothing is shared.
        shared: as for `segments`.
        num_virtual: slots of prompt tuning at the start of each segment.
    """
    if shared:
        return lengths + (sides - 1) * (prompts > 0) + num_virtual
    return lengths + (sides - 1) * prompts + sides * num_virtual
