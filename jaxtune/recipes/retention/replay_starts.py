"""What the samples of `jaxtune data replay` begin with."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxtune.core.errors import RequestError
from jaxtune.data.prompts import read_prompts
from jaxtune.data.sources import open_source
from jaxtune.data.tokenizer import Tokenizer
from jaxtune.recipes.evaluation.data import Entry, open_one
from jaxtune.recipes.language_model import LanguageModel

# Of these formats nothing says where the model's own words begin.
WHOLE = ("text", "tokens")


@dataclass(frozen=True)
class Starts:
    """What samples begin with.

    Attributes:
        ids: of each.
        places: `FILE:LINE` of each, for errors; None for BOS alone.
    """

    ids: tuple[tuple[int, ...], ...]
    places: tuple[str | None, ...]

    @property
    def digest(self) -> str:
        """A hash of all ids, in hexadecimal."""
        text = json.dumps(self.ids).encode()
        return hashlib.blake2b(text, digest_size=16).hexdigest()


def starts_of(
    lm: LanguageModel, source: str | None, format: str | None, first_tokens: int | None
) -> Starts:
    """Returns what the samples begin with; arguments and errors as for `write_replay`."""
    if source is None:
        for flag, value in (("--format", format), ("--first_tokens", first_tokens)):
            if value is not None:
                raise RequestError("needs --source", key=flag)
        return Starts(((begin_id(lm),),), (None,))
    if format is None:
        raise RequestError("is missing: what a record of --source holds", key="--format")
    if first_tokens is not None and format not in WHOLE:
        raise RequestError(f"is for formats {' and '.join(WHOLE)}", key="--first_tokens")
    if format == "prompt":
        if lm.tokenizer is None:
            raise RequestError("format 'prompt' needs a tokenizer", where=lm.source)
        prompts = read_prompts(
            open_source(source, "--source"),
            lm.tokenizer,
            max_prompt=lm.config.max_context,
            key="--source",
        )
        ids = np.split(prompts.ids, prompts.offsets[1:-1])
        return Starts(tuple(map(tuple, map(np.ndarray.tolist, ids))), _places(prompts))
    overlong = "truncate" if format in WHOLE else "error"
    store = open_one(lm, Entry("starts", source, format, "--source", overlong=overlong))
    least = 8 if first_tokens is None else first_tokens
    examples = (store.example(i) for i in range(len(store)))
    return Starts(
        tuple(start_of(ids.tolist(), mask, least, lm.tokenizer) for ids, mask in examples),
        _places(store),
    )


def start_of(
    ids: list[int], mask: np.ndarray, least: int, tokenizer: Tokenizer | None
) -> tuple[int, ...]:
    """Returns what stands before the first target, or the first `least` tokens if all are targets.

    The last token is never part of it: it may be the one that ends the text.

    >>> start_of([5, 6, 7, 8], np.array([0, 0, 1, 1]), 3, None)
    (5, 6)
    >>> start_of([5, 6, 7, 8], np.array([0, 1, 1, 1]), 2, None)
    (5, 6)
    """
    count = int(np.argmax(mask > 0))
    if count == 1:  # no token is a target in the first place
        begun = tokenizer is not None and ids[0] == tokenizer.bos_id
        count = min(least + begun, len(ids) - 1)
    return tuple(ids[:count])


def _places(store: Any) -> tuple[str, ...]:
    return tuple(store.where(i) for i in range(len(store)))


def begin_id(lm: LanguageModel) -> int:
    """Returns the id that a text of the model begins with.

    Raises:
        RequestError: neither its tokenizer nor its config.json names one.
    """
    known = None if lm.tokenizer is None else lm.tokenizer.bos_id
    known = (lm.raw or {}).get("bos_token_id") if known is None else known
    if not isinstance(known, int):
        raise RequestError(
            "has no token that a text begins with (BOS); give --source, whose texts samples "
            "begin with",
            key="--model",
            where=lm.source,
        )
    return known


def check_room(lm: LanguageModel, starts: Starts, max_new_tokens: int) -> None:
    """Raises RequestError for a start that leaves too few positions."""
    lead = lm.method.num_virtual + lm.method.position_offset
    for ids, place in zip(starts.ids, starts.places, strict=True):
        if lead + len(ids) + max_new_tokens > lm.config.max_context:
            raise RequestError(
                f"{lead + len(ids)} tokens and {max_new_tokens} new ones are more than the "
                f"{lm.config.max_context} positions of the model",
                key="--max_new_tokens",
                where=place,
            )
