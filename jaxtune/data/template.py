"""Chat templates: rendering them to text, and finding out how they close an assistant turn."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxtune.core.errors import RequestError

Message = Mapping[str, Any]

# Words that no template, filter or trimming rule changes, so that they can be found again in a
# rendering. Letters only: some templates treat punctuation and angle brackets.
QUESTION = "jaxtuneQuestionProbe"
ANSWER = "jaxtuneAnswerProbe"
FOLLOW_UP = "jaxtuneFollowUpProbe"


@dataclass(frozen=True)
class Endings:
    """What a template writes after the content of an assistant turn.

    Attributes:
        tail: everything that follows the content when the turn is the last one.
        last: the terminator of the last turn, a prefix of `tail`; "" when the template has none.
        inner: the terminator of a turn that a user message follows; "" when there is none.
    """

    tail: str = ""
    last: str = ""
    inner: str = ""


def read_template(template: str | os.PathLike[str], key: str | None = "data.template") -> str:
    """Returns the Jinja text of `template`, which is a path or the text itself.

    Raises:
        RequestError: the file does not exist, or the text is not a valid template.
    """
    import jinja2

    text, where = str(template), None
    if "{%" not in text and "{{" not in text:
        where = Path(text)
        if not where.is_file():
            raise RequestError("no such chat template file", key=key, where=where)
        try:
            text = where.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise RequestError("the chat template is not UTF-8", key=key, where=where) from error
    try:
        # `generation` is transformers' own block tag, which plain Jinja does not know.
        plain = re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", text)
        jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(plain)
    except jinja2.TemplateSyntaxError as error:
        raise RequestError(
            f"the chat template is not valid Jinja: {error.message} (its line {error.lineno})",
            key=key,
            where=where,
        ) from error
    return text


def fit_messages(
    messages: Sequence[Message], template: str, terminator: str
) -> list[dict[str, Any]]:
    """Returns messages as a chat template is to have them.

    Thoughts that the template would not write stand before the words, in a `<think>` block; a
    terminator at the end of an answer goes, since the template adds its own; `loss_weight` goes.
    """
    out = []
    for index, message in enumerate(messages):
        new = {k: v for k, v in message.items() if k != "loss_weight"}
        if new.get("role") == "assistant":
            reasoning, content = new.get("reasoning_content"), new.get("content")
            if isinstance(content, str) and terminator and terminator in content:
                new["content"] = content = _without_end(content, terminator, index)
            if reasoning and "reasoning_content" not in template:
                del new["reasoning_content"]
                if "message.thinking" in template:
                    new["thinking"] = reasoning
                else:
                    gap = "\n\n" if content else "\n"
                    thoughts = reasoning.strip("\n")
                    new["content"] = f"<think>\n{thoughts}\n</think>{gap}{content or ''}"
        out.append(new)
    return out


def _without_end(content: str, terminator: str, index: int) -> str:
    while content.rstrip().endswith(terminator):
        content = content.rstrip().removesuffix(terminator)
    if not content.strip():
        raise RequestError(f"messages[{index}] is nothing but {terminator!r}")
    return content


def render(
    hf: Any,
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] | None = None,
    *,
    generation: bool = False,
) -> str:
    """Renders messages to text with the template of the transformers tokenizer `hf`.

    Args:
        hf: a transformers tokenizer that has a chat template.
        messages: `{role, content, ...}` each.
        tools: JSON schemas of functions, handed to the template as they are.
        generation: adds what comes before the assistant's next words.

    Raises:
        RequestError: the template refuses the conversation, with its own words.
    """
    import jinja2

    wrong = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)
    try:
        return hf.apply_chat_template(
            [dict(m) for m in messages],
            tools=list(tools) if tools else None,
            tokenize=False,
            add_generation_prompt=generation,
        )
    except (jinja2.TemplateError, MemoryError, *wrong) as error:
        raise RequestError(f"the chat template refuses this conversation: {error}") from error


def probe_endings(hf: Any) -> Endings:
    """Finds how the template closes assistant turns by rendering probe conversations.

    The terminator is what a turn ends with both when it is the last and when a user message
    follows, compared token by token, so that `<|end|>` is told from the `<|user|>` after it.
    """
    question = {"role": "user", "content": QUESTION}
    answer = {"role": "assistant", "content": ANSWER}
    try:
        alone = render(hf, [question, answer])
        followed = render(hf, [question, answer, {"role": "user", "content": FOLLOW_UP}])
    except RequestError:
        return Endings()
    for text, words in ((alone, (QUESTION, ANSWER)), (followed, (QUESTION, ANSWER, FOLLOW_UP))):
        if any(text.count(word) != 1 for word in words):
            return Endings()
    header = alone[: alone.index(QUESTION)]
    tail = alone[alone.index(ANSWER) + len(ANSWER) :]
    between = followed[followed.index(ANSWER) + len(ANSWER) : followed.index(FOLLOW_UP)]
    inner = _common_tokens(hf, tail, between).rstrip()
    if not inner.strip():
        # A template may close inner turns and the last turn with different special tokens.
        inner = _closing_special(hf, between, header, question)
    last = inner if inner and tail.startswith(inner) else tail.rstrip()
    return Endings(tail, last if last.strip() else "", inner)


def _common_tokens(hf: Any, left: str, right: str) -> str:
    """Returns the text of the tokens that `left` and `right` both begin with."""
    if not left or not right:
        return ""
    one, two = (
        hf(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        for text in (left, right)
    )
    end = 0
    for a, b, span in zip(one["input_ids"], two["input_ids"], one["offset_mapping"], strict=False):
        if a != b:
            break
        end = span[1]
    return left[:end] if left[:end] == right[:end] else ""


def special_tokens(hf: Any) -> list[str]:
    """Returns the special tokens of a transformers tokenizer, the longest first.

    Also those that only its table of added tokens marks, as gpt-oss's `<|end|>` and `<|call|>`.
    """
    marked = (token.content for token in hf.added_tokens_decoder.values() if token.special)
    return sorted({*hf.all_special_tokens, *marked} - {""}, key=len, reverse=True)


def _closing_special(hf: Any, between: str, header: str, question: Message) -> str:
    """Returns the special token that opens `between`, if it closes the turn before.

    It does where no user header holds it, and where a user turn ends with it that nothing follows:
    gpt-oss closes every message but the last with `<|end|>`.
    """
    try:
        alone = render(hf, [question])
    except RequestError:
        alone = ""
    closing = alone.rpartition(QUESTION)[2].strip() if QUESTION in alone else ""
    for token in special_tokens(hf):
        body = between.lstrip()
        if body.startswith(token) and (token not in header or token == closing):
            return between[: len(between) - len(body)] + token
    return ""
