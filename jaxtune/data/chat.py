"""The one renderer: examples to token ids, with the tokens that are trained and whose they are.

An example is written out as text once and tokenised once. Which tokens are targets follows from
character spans of that text through the tokenizer's offsets: never from token ids (padding and
end of sequence may share one), and never from tokenising the parts.

What is trained of a conversation: for each assistant turn, what the turn adds to the prompt that
generation would start from, up to and including exactly one terminator. White space that the
template writes after the terminator is not trained. If the template has no terminator at all, the
end-of-sequence token is appended after the last turn, since otherwise the model never stops; in
every other case the ids are exactly those of `apply_chat_template` for the messages that
`fit_messages` gives. If the template ignores `add_generation_prompt`, the turn's header is trained
too, since generation starts before it.

A turn is trained as the template writes it in the whole conversation: where it drops the thoughts
of earlier turns (Qwen 3), those are neither seen nor trained, and the last turn's are both.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from jaxtune.core.errors import RequestError
from jaxtune.data.conversations import Conversation
from jaxtune.data.formats import Completion, Example, Text
from jaxtune.data.template import Message, fit_messages, render
from jaxtune.data.tokenizer import Tokenizer
from jaxtune.data.turns import find_turn

# What a token belongs to, for display only; `Rendered.roles` holds indices into this.
ROLE_NAMES = (
    "template", "system", "user", "assistant", "tool", "prompt", "completion", "text",
)  # fmt: skip
_ROLE = {name: code for code, name in enumerate(ROLE_NAMES)} | {"developer": 1}


@dataclass(frozen=True)
class Rendered:
    """An example in tokens.

    Attributes:
        ids: int32 [T].
        mask: float32 [T], weight of the token as a target (1 unless the turn has another one), 0
            where it is none; the first token never is.
        roles: uint8 [T], indices into `ROLE_NAMES`.
        columns: {name: array [T]}, what else is known of each token; see `columns`.
        values: {name: number}, what is known of the example.
        marks: the last token of what ends at each of the draft's marks.
    """

    ids: np.ndarray
    mask: np.ndarray
    roles: np.ndarray
    columns: Mapping[str, np.ndarray] = field(default_factory=dict)
    values: Mapping[str, float] = field(default_factory=dict)
    marks: tuple[int, ...] = ()


class Span(NamedTuple):
    """Characters [start, end) that are trained, and the weight of their tokens as targets."""

    start: int
    end: int
    weight: float = 1.0


@dataclass(frozen=True)
class Draft:
    """An example written out as text, not tokenised yet.

    Attributes:
        text: all of it.
        spans: what is trained.
        roles: (end character, role code), ascending; what follows the last is template.
        special: whether the tokenizer adds its special tokens (BOS) around the text.
        eos: whether exactly one end-of-sequence token closes the example, as a target.
        marks: characters at which something ends whose last token is to be known.
    """

    text: str
    spans: tuple[Span, ...]
    roles: tuple[tuple[int, int], ...]
    special: bool
    eos: bool
    marks: tuple[int, ...] = ()


def render_chat(
    messages: Sequence[Message],
    tokenizer: Tokenizer,
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> Rendered:
    """Renders a conversation whose assistant turns are trained.

    Raises:
        RequestError: the tokenizer has no template, the template refuses the messages, or the
            assistant's words cannot be found in what it writes.
    """
    return encode_drafts([draft_chat(messages, tokenizer, tools)], tokenizer)[0]


def render_prompt(
    messages: Sequence[Message],
    tokenizer: Tokenizer,
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> list[int]:
    """Returns the ids from which the assistant's next turn is generated."""
    _need_template(tokenizer)
    fitted = fit_messages(messages, tokenizer.chat_template or "", tokenizer.turn_end)
    return tokenizer.encode(render(tokenizer.hf, fitted, tools, generation=True), special=False)


def render_completion(prompt: str, completion: str, tokenizer: Tokenizer) -> Rendered:
    """Renders prompt and completion, tokenised as one text and closed by one EOS."""
    return encode_drafts([draft_completion(prompt, completion)], tokenizer)[0]


def render_text(text: str, tokenizer: Tokenizer) -> Rendered:
    """Renders a document, closed by one EOS if the tokenizer has one; all of it is trained."""
    return encode_drafts([_draft_text(text)], tokenizer)[0]


def draft(example: Example, tokenizer: Tokenizer) -> Draft:
    """Writes an example (other than `Tokens`) out as text."""
    match example:
        case Conversation(messages, tools):
            return draft_chat(messages, tokenizer, tools)
        case Completion(prompt, completion):
            return draft_completion(prompt, completion)
        case Text(text):
            return _draft_text(text)
    raise TypeError(f"{type(example).__name__} has no text")


def encode_drafts(drafts: Sequence[Draft], tokenizer: Tokenizer) -> list[Rendered]:
    """Tokenises drafts together, each once, and maps their spans to tokens."""
    out: list[Rendered | None] = [None] * len(drafts)
    for special in (False, True):
        chosen = [i for i, d in enumerate(drafts) if d.special == special]
        if chosen:
            texts = [drafts[i].text for i in chosen]
            for i, ids, offsets in zip(
                chosen, *tokenizer.encode_with_offsets(texts, special), strict=True
            ):
                out[i] = _assemble(drafts[i], ids, offsets, tokenizer)
    return out


def _assemble(
    draft: Draft, ids: list[int], offsets: list[tuple[int, int]], tokenizer: Tokenizer
) -> Rendered:
    token_ids = np.array(ids, np.int32)
    start, end = np.array(offsets, np.int64).reshape(-1, 2).T
    mask = np.zeros(len(token_ids), np.float32)
    for span in draft.spans:
        # A token on the boundary belongs to the span: it holds a part of what is to be learnt.
        # Tokens without characters (BOS and what else the tokenizer adds) have start == end.
        inside = (end > span.start) & (start < span.end) & (end > start)
        mask[inside] = np.maximum(mask[inside], span.weight)
    ends = np.array([e for e, _ in draft.roles], np.int64)
    codes = np.array([c for _, c in draft.roles] + [0], np.uint8)
    roles = np.where(end > start, codes[np.searchsorted(ends, end, side="left")], 0)
    if draft.eos:
        eos = tokenizer.eos_id
        if eos is None:
            raise RequestError("the tokenizer has no end-of-sequence token to close examples with")
        if not len(token_ids) or token_ids[-1] != eos:
            token_ids = np.append(token_ids, np.int32(eos))
            roles = np.append(roles, codes[max(0, len(ends) - 1)])
            mask = np.append(mask, np.float32(0))
        mask[-1] = draft.spans[-1].weight
    mask[:1] = 0.0
    marks = tuple(int(np.flatnonzero((end > start) & (start < m))[-1]) for m in draft.marks)
    return Rendered(token_ids, mask, roles.astype(np.uint8), marks=marks)


def draft_completion(prompt: str, completion: str) -> Draft:
    """Writes a prompt and its completion out as one text, closed by one EOS."""
    text = prompt + completion
    roles = ((len(prompt), _ROLE["prompt"]), (len(text), _ROLE["completion"]))
    return Draft(text, (Span(len(prompt), len(text)),), roles, special=True, eos=True)


def draft_steps(prompt: str, answer: str, ends: Sequence[int]) -> Draft:
    """Writes a prompt and its answer out as one text, with marks at characters of the answer."""
    marks = tuple(len(prompt) + end for end in ends)
    return dataclasses.replace(draft_completion(prompt, answer), eos=False, marks=marks)


def _draft_text(text: str) -> Draft:
    return Draft(text, (Span(0, len(text)),), ((len(text), _ROLE["text"]),), special=True, eos=True)


def _need_template(tokenizer: Tokenizer) -> None:
    if not tokenizer.chat_template:
        raise RequestError("the tokenizer has no chat template; set data.template")


def draft_chat(
    messages: Sequence[Message],
    tokenizer: Tokenizer,
    tools: Sequence[Mapping[str, Any]] | None = None,
    start: int = 0,
) -> Draft:
    """Writes a conversation out as text and finds the span of each assistant turn in it.

    Args:
        messages, tokenizer, tools: as for `render_chat`.
        start: the first message that may be trained; turns before it are context.

    Raises:
        RequestError: as for `render_chat`.
    """
    _need_template(tokenizer)
    terminator = tokenizer.turn_end
    fitted = fit_messages(messages, tokenizer.chat_template or "", terminator)
    full = render(tokenizer.hf, fitted, tools)
    spans, terminated = [], False
    for index, message in enumerate(fitted):
        if message["role"] == "assistant" and index >= start:
            turn = find_turn(full, fitted, index, tokenizer, tools)
            if turn is None:
                raise RequestError(
                    f"cannot tell what messages[{index}] is in what the chat template writes: the "
                    "template changes or drops earlier turns; give another one in data.template"
                )
            words = full[turn.start : turn.end]
            if terminator and words.count(terminator) > turn.terminated:
                raise RequestError(
                    f"messages[{index}] holds {terminator!r}, which ends a turn in this chat "
                    "template; take it out of the text"
                )
            weight = messages[index].get("loss_weight")
            spans.append(Span(turn.start, turn.end, 1.0 if weight is None else float(weight)))
            terminated |= turn.terminated
    return Draft(
        full,
        tuple(spans),
        _role_ends(full, fitted, spans, start),
        special=False,
        eos=not terminated,
    )


def _role_ends(
    full: str, messages: Sequence[Message], spans: Sequence[Span], start: int
) -> tuple[tuple[int, int], ...]:
    """Says up to which character each message reaches, headers included; for display."""
    ends: list[tuple[int, int]] = []
    cursor, turns = 0, iter(spans)
    for index, message in enumerate(messages):
        role = message["role"]
        if role == "assistant" and index >= start:
            begin, end, _ = next(turns)
            if begin > cursor:
                ends.append((begin, _ROLE["template"]))
            cursor = end
        else:
            words = str(message.get("content") or "").strip()
            found = full.find(words, cursor) if words else -1
            if found < 0:
                continue
            if found > cursor:
                ends.append((found, _ROLE["template"]))
            cursor = found + len(words)
        ends.append((cursor, _ROLE[role]))
    return tuple(ends)
