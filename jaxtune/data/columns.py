"""What is known of each token beside its id and mask, and how much room examples take in a row.

A batch key of these stands on every token that it belongs to, 0 elsewhere:

- `completions` int32: which completion of the row the token is a target of, 1, 2, ... counting on
  over the examples of a row; 0 where it is no target. Completions 2k - 1 and 2k are chosen and
  rejected of pair k. In judged answers each step counts as one.
- `groups` int32, where ranked lists are: which list of the row, 1, 2, ...; its completions follow
  one another, the best first. A pair is a list of two.
- `branches` int32, where prompts are shared: 0 on the prompt, 1, 2, ... on its completions. A
  token sees the keys of its segment whose branch is 0 or its own.
- `example_weight` float32: of the example, on its targets.
- `margin` float32: of the pair, on its targets; 0 in ranked lists.
- `label` float32: of an unpaired completion on its targets, of a step on its last token.
- `ref_logprobs` float32: the token's log-probability under the reference; see `with_column`.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import numpy as np

DTYPES: Mapping[str, type] = {
    "completions": np.int32,
    "groups": np.int32,
    "branches": np.int32,
    "example_weight": np.float32,
    "margin": np.float32,
    "label": np.float32,
    "ref_logprobs": np.float32,
}
# Keys of the examples of a format; those of the other formats have none.
KEYS: Mapping[str, tuple[str, ...]] = {
    "preference": ("completions", "example_weight", "margin"),
    "ranked": ("completions", "groups", "example_weight"),
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


def segments(branches: np.ndarray | None, size: int, shared: bool) -> list[np.ndarray | slice]:
    """Returns which tokens of an example make up each of its segments, in order.

    Args:
        branches: int32 [n] of the example, or None where it has none.
        size: n.
        shared: whether the completions of a prompt share it: then all are one segment, else each
            completion is one behind a prompt of its own.
    """
    if branches is None or shared:
        return [slice(0, size)]
    bounds = np.searchsorted(branches, np.arange(branches[-1] + 2))
    prompt = np.arange(bounds[1])
    return [
        np.concatenate([prompt, np.arange(start, end)])
        for start, end in itertools.pairwise(bounds[1:])
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
    copies = np.ones_like(sides) if shared else sides
    return lengths + (copies - 1) * prompts + copies * num_virtual
