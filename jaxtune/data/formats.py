"""What a record means: strict readers from JSON fields to typed examples."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from jaxtune.core.errors import RequestError, nearest
from jaxtune.data import fields
from jaxtune.data.conversations import Conversation, parse_chat
from jaxtune.data.instructions import instruction_prompt, instruction_question
from jaxtune.data.preferences import (
    Alternatives,
    Prompt,
    Steps,
    parse_preference,
    parse_prompt,
    parse_ranked,
    parse_stepwise,
    parse_unpaired,
)
from jaxtune.data.sources import Record

# Weights are kept in float32.
_SMALLEST, _LARGEST = (float(x) for x in (np.finfo(np.float32).tiny, np.finfo(np.float32).max))


@dataclass(frozen=True)
class Completion:
    """A prompt, which is context, and a completion, which is trained."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Text:
    """A document, all of which is trained."""

    text: str


@dataclass(frozen=True)
class Tokens:
    """Token ids and the weight of each as a target; weights may be absent (all 1)."""

    input_ids: tuple[int, ...]
    loss_mask: tuple[float, ...] | None = None


Example = Conversation | Completion | Text | Tokens | Alternatives | Steps | Prompt


def parse(
    record: Record,
    format: str,
    *,
    chat: bool = False,
    where: str | None = None,
    key: str | None = None,
) -> Example:
    """Reads a record of the given format.

    Args:
        record: fields as JSON gives them; fields that the format does not name are ignored.
        format: a name in `FORMATS`.
        chat: whether the tokenizer has a chat template; decides what an instruction becomes.
        where: place named in errors.
        key: config key named in errors.

    Raises:
        RequestError: a field is missing, of a wrong type or empty, or roles are out of order.
    """
    check_format(format, key)
    try:
        return FORMATS[format](record, chat)
    except RequestError as error:
        raise RequestError(error.message, key=key, where=where) from None


def check_format(format: str, key: str | None = None) -> None:
    """Raises RequestError unless `format` is one of `FORMATS`."""
    if format not in FORMATS:
        names = ", ".join(FORMATS)
        raise RequestError(f"unknown format {format!r}{nearest(format, FORMATS)}: {names}", key=key)


def _parse_text(record: Record, chat: bool) -> Text:
    return Text(fields.text(record, "text", filled=True))


def _parse_completion(record: Record, chat: bool) -> Completion:
    return Completion(fields.text(record, "prompt"), fields.text(record, "completion", filled=True))


def _parse_instruction(record: Record, chat: bool) -> Conversation | Completion:
    instruction = fields.text(record, "instruction", filled=True)
    context = fields.text(record, "input", default="")
    output = fields.text(record, "output", filled=True)
    if not chat:
        return Completion(instruction_prompt(instruction, context), output)
    question = instruction_question(instruction, context)
    return Conversation(
        ({"role": "user", "content": question}, {"role": "assistant", "content": output})
    )


def _parse_chat(record: Record, chat: bool) -> Conversation:
    return parse_chat(record)


def _parse_tokens(record: Record, chat: bool) -> Tokens:
    ids = fields.present(record, "input_ids")
    # type() rather than isinstance(): True is an int, and no token id
    if not isinstance(ids, list) or not all(type(i) is int for i in ids):
        raise RequestError("field 'input_ids' must be an array of integers")
    if not ids:
        raise RequestError("field 'input_ids' is empty, which leaves nothing to train on")
    mask = record.get("loss_mask")
    if mask is None:
        return Tokens(tuple(ids))
    if not isinstance(mask, list) or not all(isinstance(w, int | float) for w in mask):
        raise RequestError("field 'loss_mask' must be an array of numbers")
    if len(mask) != len(ids):
        raise RequestError(f"loss_mask has {len(mask)} entries for {len(ids)} input_ids")
    try:
        weights = tuple(float(w) for w in mask)
    except OverflowError:  # an integer beyond every float
        weights = (math.inf,)
    if not all(w == 0 or _SMALLEST <= w <= _LARGEST for w in weights):
        raise RequestError(
            "field 'loss_mask' must hold weights that are not negative and finite in 32 bits: 0, "
            f"or {_SMALLEST:g} to {_LARGEST:g}"
        )
    return Tokens(tuple(ids), weights)


# A new format is one reader and one entry here.
FORMATS: dict[str, Callable[[Record, bool], Example]] = {
    "chat": _parse_chat,
    "completion": _parse_completion,
    "instruction": _parse_instruction,
    "text": _parse_text,
    "tokens": _parse_tokens,
    "preference": parse_preference,
    "unpaired": parse_unpaired,
    "ranked": parse_ranked,
    "stepwise": parse_stepwise,
    "prompt": parse_prompt,
}
