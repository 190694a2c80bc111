"""The words of an example by what they are for, whatever its format."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from jaxtune.data.conversations import Conversation
from jaxtune.data.formats import Completion, Example, Text, Tokens
from jaxtune.data.preferences import Alternatives, Messages, Prompt, Steps

_UNSEEN = ("system", "developer")  # often the same for all rows: no part of what a row says


@dataclass(frozen=True)
class View:
    """What a row says.

    Attributes:
        prompt: what the answers answer; empty for documents.
        answers: what is to be learnt, in order; of alternatives, the best.
        rejected: the other alternatives.
        system: system prompts.
        roles: of a conversation, in order.
        label: of a judged answer, or None.
        tokens: whether the row holds ids in place of words.
    """

    prompt: str
    answers: tuple[str, ...]
    rejected: tuple[str, ...] = ()
    system: str = ""
    roles: tuple[str, ...] = ()
    label: str | None = None
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

    def asked(self) -> tuple[str, str] | None:
        """Returns what is asked and what is said to it: rows that differ in the latter conflict.

        Of judged answers the answer belongs to the question, and the judgement is what is said; of
        alternatives, which of them is the best.
        """
        if not self.prompt.strip() or not self.answer.strip():
            return None
        question = f"{self.system}\n{self.prompt}"
        if self.label is not None:
            return f"{question}\n{self.answer}", self.label
        if self.rejected:
            return "\n".join([question, *sorted((*self.answers, *self.rejected))]), self.answer
        return question, self.answer


def view(example: Example) -> View:
    """Returns the words of an example."""
    match example:
        case Conversation(messages, _):
            return _conversation(messages)
        case Completion(prompt, completion):
            return View(prompt, (completion,))
        case Text(text):
            return View("", (text,))
        case Tokens():
            return View("", (), tokens=True)
        case Alternatives():
            label = f"{example.label:g}" if example.kind == "unpaired" else None
            return _answered(example.prompt, map(_said, example.completions), label)
        case Steps(prompt, steps, _):
            return _answered(prompt, ["\n".join(steps)], None)
        case Prompt(prompt, _):
            return _answered(prompt, [], None)
    raise TypeError(f"{type(example).__name__} has no words that are known")


def _answered(prompt: str | Messages, answers: Iterable[str], label: str | None) -> View:
    best, *others = [*answers] or [None]
    kept = () if best is None else (best,)
    if isinstance(prompt, str):
        return View(prompt, kept, tuple(others), label=label)
    shown = _conversation(prompt)
    words = "\n".join(filter(None, (shown.prompt, *shown.answers)))
    return View(words, kept, tuple(others), shown.system, shown.roles, label)


def _said(completion: str | Messages) -> str:
    return completion if isinstance(completion, str) else "\n".join(map(_content, completion))


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
