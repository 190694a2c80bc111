"""The words of an example by what they are for, whatever its format."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from jaxtune.data.conversations import Conversation
from jaxtune.data.formats import Completion, Example, Text, Tokens

# Names of fields that hold answers: any other text is taken for prompt.
_ANSWERS = ("chosen", "completion", "completions", "answer", "answers", "response")
_REJECTED = ("rejected",)
_UNSEEN = ("system", "developer")  # often the same for all rows: no part of what a row says


@dataclasses.dataclass(frozen=True)
class View:
    """What a row says.

    Attributes:
        prompt: what the answers answer; empty for documents.
        answers: what is trained, in order; of a preference, the chosen.
        rejected: answers that are to be unlearnt.
        system: system prompts.
        roles: of a conversation, in order.
        tokens: whether the row holds ids in place of words.
    """

    prompt: str
    answers: tuple[str, ...]
    rejected: tuple[str, ...] = ()
    system: str = ""
    roles: tuple[str, ...] = ()
    tokens: bool = False

    @property
    def answer(self) -> str:
        """The last answer."""
        return self.answers[-1] if self.answers else ""

    def body(self) -> str:
        """Returns all words but the system prompt's."""
        return "\n".join(filter(None, (self.prompt, *self.answers, *self.rejected)))

    def everything(self) -> str:
        """Returns all words."""
        return "\n".join(filter(None, (self.system, self.body())))


def view(example: Example) -> View:
    """Returns the words of an example.

    The types of `formats` are known by name; one that is added there is read by the names of its
    fields, so that it needs nothing here.
    """
    match example:
        case Conversation(messages, _):
            return _conversation(messages)
        case Completion(prompt, completion):
            return View(prompt, (completion,))
        case Text(text):
            return View("", (text,))
        case Tokens():
            return View("", (), tokens=True)
    prompt: list[str] = []
    answers: list[str] = []
    rejected: list[str] = []
    system, roles = "", ()
    for field in dataclasses.fields(example):
        value = getattr(example, field.name)
        if field.name in _REJECTED:
            rejected += [_last(part) for part in _several(value)]
        elif field.name in _ANSWERS:
            answers += [_last(part) for part in _several(value)]
        elif field.name == "prompt" and not isinstance(value, str):
            shown = _conversation(_messages(value))
            system, roles = shown.system, shown.roles
            prompt += [*filter(None, (shown.prompt, *shown.answers))]
        elif isinstance(value, str):
            prompt.append(value)
    return View("\n".join(prompt), tuple(answers), tuple(rejected), system, roles)


def _several(value: Any) -> Iterable[Any]:
    """A list of answers as it is, and one answer (a text, or messages) as a list."""
    if isinstance(value, list | tuple) and value and not isinstance(value[0], Mapping):
        return value
    return [value]


def _messages(value: Any) -> tuple[Mapping[str, Any], ...]:
    if isinstance(value, Conversation):
        return value.messages
    if isinstance(value, list | tuple):
        return tuple(item for item in value if isinstance(item, Mapping))
    return ()


def _last(value: Any) -> str:
    if isinstance(value, str):
        return value
    messages = _messages(value)
    return _content(messages[-1]) if messages else ""


def _content(message: Mapping[str, Any]) -> str:
    words = message.get("content") or ""
    thoughts = message.get("reasoning_content") or ""
    calls = message.get("tool_calls") or ""
    return "\n".join(str(part) for part in (thoughts, words, calls) if part)


def _conversation(messages: Iterable[Mapping[str, Any]]) -> View:
    prompt: list[str] = []
    answers: list[str] = []
    system: list[str] = []
    roles = []
    messages = list(messages)
    for at, message in enumerate(messages):
        role, words = message["role"], _content(message)
        roles.append(role)
        if role in _UNSEEN:
            system.append(words)
        elif role == "assistant":
            if at == len(messages) - 1:
                answers.append(words)
            else:  # an earlier turn: trained, and context of what follows
                prompt.append(words)
        else:
            prompt.append(words)
    return View("\n".join(prompt), tuple(answers), (), "\n".join(system), tuple(roles))


def strings(value: Any) -> Iterator[str]:
    """Yields every text in a record, however deep; of records that no format reads, too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from strings(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from strings(item)


def loose_view(record: Mapping[str, Any]) -> View:
    """Returns a view of a record that its format refuses: all of it is prompt."""
    return View("\n".join(strings(record)), ())
