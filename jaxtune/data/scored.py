"""Texts that a reward model is to score, as the rows that it was trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxtune.core.errors import RequestError
from jaxtune.data.chat import Draft, Span, draft_chat, draft_completion, encode_drafts
from jaxtune.data.conversations import read_turns
from jaxtune.data.tokenizer import Tokenizer

# A prompt with its completion, or a conversation that ends with the assistant's turn.
Scored = str | Sequence[Mapping[str, Any]]


def scored_ids(texts: Sequence[Scored], tokenizer: Tokenizer) -> list[list[int]]:
    """Returns the ids of each text up to the token at which training reads its score.

    They are those of a side of a training row: a string is a prompt and its completion, with the
    tokenizer's BOS and closed by exactly one EOS; messages are written by the chat template, up to
    the terminator of the assistant's turn. A string that ends with a terminator that is not EOS, or
    with EOS and begins with BOS, is what the template has written already: nothing is added to it.

    Raises:
        RequestError: a text that is empty, messages that do not end with the assistant's, and what
            `chat.encode_drafts` and `chat.draft_chat` raise.
    """
    drafts = [_draft(text, f"texts[{i}]", tokenizer) for i, text in enumerate(texts)]
    return [one.ids[: _end(one.mask)].tolist() for one in encode_drafts(drafts, tokenizer)]


def _end(mask: np.ndarray) -> int:
    """Returns the place behind the last target; of a text without one, its end."""
    targets = np.flatnonzero(mask)
    return int(targets[-1]) + 1 if len(targets) else len(mask)


def _draft(text: Scored, at: str, tokenizer: Tokenizer) -> Draft:
    if not isinstance(text, str):
        messages = read_turns(at, text)
        if messages[-1]["role"] != "assistant":
            raise RequestError(f"the last message of {at} is not the assistant's")
        return draft_chat(messages, tokenizer, start=len(messages) - 1)
    if not text.strip():
        raise RequestError("is empty", key=at)
    end, written = tokenizer.turn_end, text.rstrip()
    if tokenizer.hf.eos_token and end != tokenizer.hf.eos_token:  # it may close a conversation
        written = written.removesuffix(tokenizer.hf.eos_token).rstrip()
    if tokenizer.chat_template and end and written.endswith(end):
        # Where EOS ends the turns, BOS tells what a template wrote from a string with its own EOS.
        bos = tokenizer.hf.bos_token
        whole = end != tokenizer.hf.eos_token or (bool(bos) and written.startswith(bos))
        span = Span(len(written) - len(end), len(written))
        return Draft(written, (span,), (), special=not whole, eos=False)
    return draft_completion("", text)
