"""Completions that share a prompt: written out, tokenised once each, joined into one example.

Each side is the prompt and a completion as one text, tokenised as a whole. The ids that all sides
begin with, up to the first trained one of any, are the prompt, which the example holds once; what
is left of each side is its branch. Where the tokenizer merges across the boundary on one side and
not on another, the prompt ends before the merged token, and the tokens of that text are targets
of every side: all sides are predicted from the same tokens.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np

from jaxtune.core.errors import RequestError
from jaxtune.data.chat import (
    Draft,
    Rendered,
    draft,
    draft_chat,
    draft_completion,
    draft_steps,
)
from jaxtune.data.formats import Example
from jaxtune.data.preferences import Alternatives, Steps
from jaxtune.data.tokenizer import Tokenizer


def drafts_of(example: Example, tokenizer: Tokenizer) -> list[Draft]:
    """Writes an example out as the texts that it is tokenised from.

    Raises:
        RequestError: as for `chat.draft_chat`.
    """
    match example:
        case Alternatives():
            return draft_sides(example, tokenizer)
        case Steps():
            return [draft_judged(example, tokenizer)]
    return [draft(example, tokenizer)]


def joined(example: Example, drafts: Sequence[Draft], rendered: Sequence[Rendered]) -> Rendered:
    """Returns the example that its drafts, tokenised, make together.

    Raises:
        RequestError: there is nothing to train on, or to compare.
    """
    match example:
        case Alternatives():
            return join_sides(example, drafts, rendered)
        case Steps():
            return join_steps(example, rendered[0])
    return rendered[0]


def draft_sides(example: Alternatives, tokenizer: Tokenizer) -> list[Draft]:
    """Writes each side out as text: the prompt as context, the completion as what is trained.

    Raises:
        RequestError: as for `chat.draft_chat`.
    """
    prompt = example.prompt
    if isinstance(prompt, str):
        return [draft_completion(prompt, side) for side in example.completions]
    return [
        draft_chat((*prompt, *side), tokenizer, example.tools or None, start=len(prompt))
        for side in example.completions
    ]


def join_sides(
    example: Alternatives, drafts: Sequence[Draft], sides: Sequence[Rendered]
) -> Rendered:
    """Returns the example: the prompt, then what is left of each side.

    Its column `branches` int32 is 0 on the prompt and 1, 2, ... on the sides. A single side has
    none: it is a prompt and a completion as any other.

    Raises:
        RequestError: a side has no target.
    """
    values = {"example_weight": example.weight}
    for i, side in enumerate(sides):
        if not side.mask.any():
            raise RequestError(f"no token of completion {i + 1} is trained")
    if example.kind == "unpaired":
        (side,) = sides
        return Rendered(side.ids, side.mask, side.roles, {}, values | {"label": example.label})
    values |= {"margin": example.margin}
    if len({side.ids.tobytes() for side in sides}) < len(sides):
        raise RequestError("two completions are the same tokens")
    firsts = [int(np.argmax(side.mask > 0)) for side in sides]
    size = min(firsts)
    for side in sides[1:]:
        differs = np.flatnonzero(side.ids[:size] != sides[0].ids[:size])
        size = int(differs[0]) if len(differs) else size
    prompts = {draft.text[: draft.spans[0].start] for draft in drafts}
    masks = [side.mask.copy() for side in sides]
    if len(prompts) == 1:
        for mask, first in zip(masks, firsts, strict=True):
            mask[size:first] = mask[first]
            mask[:1] = 0.0  # nothing comes before it, if nothing is shared
    rest = [side.ids[size:] for side in sides]
    branches = np.repeat(np.arange(1, len(sides) + 1, dtype=np.int32), [len(r) for r in rest])
    return Rendered(
        np.concatenate([sides[0].ids[:size], *rest]),
        np.concatenate([np.zeros(size, np.float32), *(mask[size:] for mask in masks)]),
        np.concatenate([sides[0].roles[:size], *(side.roles[size:] for side in sides)]),
        {"branches": np.concatenate([np.zeros(size, np.int32), branches])},
        values,
    )


def draft_judged(example: Steps, tokenizer: Tokenizer) -> Draft:
    """Writes a judged answer out as text, with a mark at the end of each step.

    Raises:
        RequestError: as for `chat.draft_chat`; or a step cannot be found in what it writes.
    """
    answer, ends = "", []
    for step in example.steps:
        answer += "\n" if ends and not (answer[-1].isspace() or step[0].isspace()) else ""
        answer += step
        ends.append(len(answer))
    if isinstance(example.prompt, str):
        return draft_steps(example.prompt, answer, tuple(ends))
    messages = (*example.prompt, {"role": "assistant", "content": answer})
    whole = draft_chat(messages, tokenizer, start=len(example.prompt))
    cursor, marks = whole.spans[0].start, []
    for i, step in enumerate(example.steps):
        words = step.strip()
        found = whole.text.find(words, cursor)
        if found < 0:
            raise RequestError(f"completions[{i}] is not in what the chat template writes")
        cursor = found + len(words)
        marks.append(cursor)
    return dataclasses.replace(whole, marks=tuple(marks))


def join_steps(example: Steps, rendered: Rendered) -> Rendered:
    """Returns the example: the last token of each step is a target, with its label in a column.

    Raises:
        RequestError: two steps end in one token.
    """
    places = np.array(rendered.marks)
    for i, (one, two) in enumerate(itertools.pairwise(places)):
        if one >= two:
            raise RequestError(f"completions[{i}] and completions[{i + 1}] end in one token")
    if places[0] == 0:
        raise RequestError("completions[0] ends in the first token, which nothing comes before")
    mask, labels = np.zeros((2, len(rendered.ids)), np.float32)
    mask[places], labels[places] = 1.0, example.labels
    values = {"example_weight": example.weight}
    return Rendered(rendered.ids, mask, rendered.roles, {"label": labels}, values)
