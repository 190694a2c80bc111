"""A record as something to answer: what a model reads, and the answer that is wanted."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from jaxtune.core.errors import RequestError
from jaxtune.data.chat import draft_chat, draft_completion, encode_drafts, render_prompt
from jaxtune.data.conversations import Conversation
from jaxtune.data.formats import Completion, parse
from jaxtune.data.parts import by_key, values_of
from jaxtune.data.sources import Source
from jaxtune.data.tokenizer import Tokenizer

FORMATS = ("chat", "completion", "instruction")


@dataclass(frozen=True)
class Question:
    """A record as something to answer.

    Attributes:
        example: the record; of a conversation, the last turn is the answer.
        ids: from which an answer is generated.
        where: its place in the source, as `FILE:LINE`.
        group: the value of the field that parts the source; "" where none does.
    """

    example: Completion | Conversation
    ids: tuple[int, ...]
    where: str
    group: str = ""

    @property
    def wanted(self) -> str:
        """The answer that the record has."""
        if isinstance(self.example, Completion):
            return self.example.completion
        return self.example.messages[-1]["content"]

    @property
    def prompt(self) -> str:
        """What is asked, for people: of a conversation of several turns, a line each."""
        if isinstance(self.example, Completion):
            return self.example.prompt
        turns = self.example.messages[:-1]
        if len(turns) == 1:
            return str(turns[0].get("content") or "")
        return "\n".join(f"{turn['role']}: {turn.get('content') or ''}" for turn in turns)

    def answered(self, text: str, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
        """Returns (context, continuation) ids of the record with another answer.

        They are split as in training: the continuation holds what would be a target, with the
        token that ends it.

        Raises:
            RequestError: the chat template refuses the answer.
        """
        if isinstance(self.example, Completion):
            draft = draft_completion(self.example.prompt, text)
        else:
            messages = [*self.example.messages[:-1], {"role": "assistant", "content": text}]
            tools = self.example.tools or None
            draft = draft_chat(messages, tokenizer, tools, start=len(messages) - 1)
        (rendered,) = encode_drafts([draft], tokenizer)
        first = int(np.flatnonzero(rendered.mask)[0])
        last = int(np.flatnonzero(rendered.mask)[-1]) + 1
        ids = rendered.ids.tolist()
        return ids[:first], ids[first:last]


def read_questions(
    source: Source,
    format: str,
    tokenizer: Tokenizer,
    *,
    limit: int | None = None,
    by: str | None = None,
    key: str | None = None,
) -> list[Question]:
    """Reads the records of a source as questions.

    A prompt is tokenised alone, as `generate` does; a conversation is rendered by the chat
    template up to where the assistant's last words begin.

    Args:
        source: the records.
        format: one of FORMATS.
        tokenizer: with a chat template, if there are conversations.
        limit: the first so many records.
        by: a field of the records that parts them.
        key: config key named in errors.

    Raises:
        RequestError: another format, or a record that is malformed or has no answer, with its line.
    """
    if format not in FORMATS:
        raise RequestError(
            f"{format!r} has no prompt with an answer; valid: {', '.join(FORMATS)}",
            key="--format" if key == "--data" else f"{key}.format",
        )
    found = []
    chosen = range(len(source) if limit is None else min(limit, len(source)))
    groups = [""] * len(chosen) if by is None else values_of(source, chosen, by, by_key(key))
    for record in chosen:
        where = source.where(record)
        chat = bool(tokenizer.chat_template)
        example = parse(source[record], format, chat=chat, where=where, key=key)
        try:
            ids = _prompt_ids(example, tokenizer)
        except RequestError as error:
            raise RequestError(error.message, key=error.key or key, where=where) from None
        found.append(Question(example, tuple(ids), where, groups[record]))
    return found


def _prompt_ids(example: Completion | Conversation, tokenizer: Tokenizer) -> list[int]:
    if isinstance(example, Completion):
        ids = tokenizer.encode(example.prompt)
    else:
        if not isinstance(example.messages[-1].get("content"), str):
            raise RequestError("the last turn has no text to compare with")
        ids = render_prompt(example.messages[:-1], tokenizer, example.tools or None)
    if not ids:
        raise RequestError("the prompt has no token")
    return ids


def with_label(question: Question, label: str) -> str:
    """Returns a label as the record would have it: with the white space around its own answer.

    >>> asked = Question(Completion("Spam?", " no"), (1,), "a:1")
    >>> with_label(asked, "yes")
    ' yes'
    """
    own = question.wanted
    before = own[: len(own) - len(own.lstrip())]
    return before + label + own[len(own.rstrip()) :]
