"""Batched generation: one sample of each prompt."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtune.core.tree import Tree
from jaxtune.generate import sampler
from jaxtune.generate.stops import StopCheck
from jaxtune.models.config import ModelConfig
from jaxtune.peft.method import Method


def generate(
    config: ModelConfig,
    method: Method,
    params: Tree,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
    eos_ids: Sequence[int] = (),
    stop_check: StopCheck | None = None,
    first_row: int = 0,
) -> list[list[int]]:
    """Continues each prompt.

    A row is a function of its prompt, its number and the settings, not of the rows beside it.

    Args:
        config, method, params: the model; sharded parameters are used where they lie.
        prompts: token ids of each row, of any lengths, not empty.
        max_new_tokens: the most tokens to write to a row.
        temperature, top_p, top_k: see `sampling.sample`; temperature 0 is greedy.
        seed: of the random draws; a row's draws come from (seed, row number, step).
        eos_ids: ids that end a row.
        stop_check: called with a row's new ids every few tokens; see `stops.stop_at`.
        first_row: the number of the first prompt, for a caller that splits a list into batches.

    Returns:
        The new ids of each row: without the prompt, without the eos that ended it, and cut to
        the length that `stop_check` gave.

    Raises:
        RequestError: no prompt, an empty prompt, an id outside the vocabulary, more tokens than
            the model has positions, or a setting out of range.
    """
    found = sampler.sample(
        config,
        method,
        params,
        prompts,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
        eos_ids=eos_ids,
        stop_check=stop_check,
        first_row=first_row,
    )
    ends = frozenset(eos_ids)
    return [ids[:-1] if ids[-1] in ends else ids for ((ids, _, _),) in found]
