"""Where each assistant turn is in what a chat template writes.

A turn is found by rendering the conversation up to it, without and with it. Some templates write
a turn otherwise once others follow it (Qwen 3 drops the thoughts of earlier turns), or move things
about; then it is looked for in the whole, with a marker in its place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxtune.core.errors import RequestError
from jaxtune.data.template import ANSWER, Message, render, special_tokens
from jaxtune.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Turn:
    """Characters [start, end) of a turn, and whether a terminator is the last of them."""

    start: int
    end: int
    terminated: bool


def find_turn(
    full: str,
    messages: Sequence[Message],
    index: int,
    tokenizer: Tokenizer,
    tools: Sequence[Mapping[str, Any]] | None,
) -> Turn | None:
    """Finds what is trained of assistant turn `index`.

    It begins where generation would and ends with one terminator, if the template has any.

    Args:
        full: what the template writes for all messages.
        messages: the conversation.
        index: of the turn.
        tokenizer: has the template.
        tools: handed to the template.

    Returns:
        The turn, or None where it cannot be told from what the template writes.
    """
    hf, last = tokenizer.hf, index == len(messages) - 1
    if index == 0:  # nothing comes before the turn that could be rendered
        return _find_by_marker(full, messages, index, tokenizer, tools)
    try:
        prefix = render(hf, messages[:index], tools, generation=True)
        whole = full if last else render(hf, messages[: index + 1], tools)
    except RequestError:  # some templates refuse a conversation that has no user message yet
        return _find_by_marker(full, messages, index, tokenizer, tools)
    if full.startswith(prefix) and whole.startswith(prefix):
        if full.startswith(whole):
            return _trim(full, len(prefix), len(whole), last, tokenizer)
        turn = _find_changed(full, prefix, whole, messages[index], tokenizer)
        if turn is not None:
            return turn
    return _find_by_marker(full, messages, index, tokenizer, tools)


def _trim(full: str, start: int, end: int, last: bool, tokenizer: Tokenizer) -> Turn:
    """Cuts what follows the terminator off a turn [start, end) that ends as the last turn does."""
    endings = tokenizer.endings
    body = full[start:end]
    if endings.last and body.endswith(endings.tail):
        keep = endings.last if last or not endings.inner else endings.inner
        return Turn(start, end - len(endings.tail) + len(keep), True)
    # Not the probe's ending, such as after a tool call: accept any closing special token.
    stripped = body.rstrip()
    for token in special_tokens(tokenizer.hf):
        if stripped.endswith(token):
            return Turn(start, start + len(stripped), True)
    terminator = endings.last.strip()
    if terminator and stripped.endswith(terminator):
        return Turn(start, start + len(stripped), True)
    return Turn(start, end, False)


def _find_changed(
    full: str, prefix: str, whole: str, message: Message, tokenizer: Tokenizer
) -> Turn | None:
    """Finds a turn that is written otherwise once other messages follow it.

    Qwen 3 drops the empty reasoning block from earlier turns; Phi 3 ends only the last turn with
    an extra token. In both cases what remains is the end of what the turn was as the last one.
    """
    endings = tokenizer.endings
    turn = whole[len(prefix) :]
    if endings.tail and turn.endswith(endings.tail):
        turn = turn[: len(turn) - len(endings.tail)]
    rest = full[len(prefix) :]
    # The visible words must all be there, so that no short coincidence is taken for the turn.
    content = str(message.get("content") or "").strip()
    words = content.rpartition("</think>")[2].strip() or content
    names = [str((call.get("function") or call).get("name", ""))
             for call in message.get("tool_calls") or ()]  # fmt: skip
    closed = turn + endings.inner
    for cut in range(len(turn)):
        # The first characters first: thoughts may be long.
        if closed[cut : cut + 8] != rest[: min(8, len(closed) - cut)]:
            continue
        if rest.startswith(closed[cut:]):
            body = turn[cut:]
            if words not in body or any(name not in body for name in names) or not body.strip():
                return None
            return Turn(len(prefix), len(prefix) + len(closed) - cut, bool(endings.inner))
    return None


def _find_by_marker(
    full: str,
    messages: Sequence[Message],
    index: int,
    tokenizer: Tokenizer,
    tools: Sequence[Mapping[str, Any]] | None,
) -> Turn | None:
    """Finds a turn by rendering all messages with a marker in its place, or in its content's.

    For templates that move something (tools, the system prompt) to the last user message, so that
    no shorter conversation is a prefix of the whole one, and for generation prompts that open a
    reasoning block which finished turns do not have.
    """
    message = messages[index]
    markers: list[Message] = [{"role": message["role"], "content": ANSWER}]
    if str(message.get("content") or "").strip():
        markers.append({**message, "content": ANSWER})
    endings = tokenizer.endings
    terminator = endings.last if index == len(messages) - 1 else endings.inner
    for marker in markers:
        try:
            text = render(tokenizer.hf, [*messages[:index], marker, *messages[index + 1 :]], tools)
        except RequestError:  # such as a tool's answer that no call comes before any more
            continue
        if text.count(ANSWER) != 1:
            continue
        start = text.index(ANSWER)
        after = text[start + len(ANSWER) :]
        end = len(full) - len(after)
        if end > start and full[:start] == text[:start] and full[end:] == after:
            if terminator and after.startswith(terminator):
                return Turn(start, end + len(terminator), True)
            return Turn(start, end, False)
    return None
