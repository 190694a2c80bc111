"""Records that compare or judge completions of a prompt.

A prompt is a string or messages. Where `prompt` is missing, `instruction` (and `input`) stand for
it as in format "instruction"; where these are missing too, `chosen` and `rejected` are whole texts
or conversations, and the prompt is what both begin with (`common_text`, `common_messages`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxtune.core.errors import RequestError
from jaxtune.data import fields
from jaxtune.data.conversations import read_tools, read_turns
from jaxtune.data.instructions import instruction_prompt, instruction_question
from jaxtune.data.sources import Record, json_type

Messages = tuple[Mapping[str, Any], ...]
# What the assistant's turn begins with in dialogues that are kept as one string (HH-RLHF).
_ASSISTANT = "\n\nAssistant:"
_SPEAKER = re.compile(r"\n\n(Human|Assistant):")


@dataclass(frozen=True)
class Alternatives:
    """A prompt and completions of it.

    Attributes:
        prompt: a string, or messages of which the last is not the assistant's.
        completions: the best first; strings if the prompt is one, else messages that begin and
            end with the assistant's.
        kind: "preference" (two), "ranked" (two or more) or "unpaired" (one).
        weight: of the example.
        margin: by how much a completion is to be better than those behind it, in units of reward.
        label: whether a single completion is wanted, 1 or 0.
        tools: JSON schemas of functions.
    """

    prompt: str | Messages
    completions: tuple[str | Messages, ...]
    kind: str
    weight: float = 1.0
    margin: float = 0.0
    label: float = 0.0
    tools: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True)
class Steps:
    """A prompt and the steps of one answer, each judged.

    Attributes:
        prompt: a string, or messages.
        steps: strings; a newline is put between two where none stands.
        labels: of each step, 0 (wrong) to 1 (right).
        weight: of the example.
    """

    prompt: str | Messages
    steps: tuple[str, ...]
    labels: tuple[float, ...]
    weight: float = 1.0


@dataclass(frozen=True)
class Prompt:
    """A prompt alone, which completions are generated for.

    Attributes:
        prompt: a string, or messages of which the last is not the assistant's.
        tools: JSON schemas of functions.
    """

    prompt: str | Messages
    tools: tuple[Mapping[str, Any], ...] = ()


def parse_prompt(record: Record, chat: bool) -> Prompt:
    """Reads {prompt[, tools]}; what else a record holds is for the rewards."""
    prompt = _read_prompt(record, chat)
    if prompt is None:
        prompt = fields.text(record, "prompt")
    if isinstance(prompt, str):
        fields.text_value(prompt, "field 'prompt'", filled=True)
        return Prompt(prompt)
    return Prompt(prompt, read_tools(record.get("tools")))


def parse_preference(record: Record, chat: bool) -> Alternatives:
    """Reads {prompt, chosen, rejected[, margin, weight, tools]}."""
    given = [fields.present(record, name) for name in ("chosen", "rejected")]
    prompt, sides = _read(record, given, ["field 'chosen'", "field 'rejected'"], chat)
    if sides[0] == sides[1]:
        raise RequestError("fields 'chosen' and 'rejected' are equal: nothing is preferred")
    return Alternatives(
        prompt,
        sides,
        "preference",
        _weight(record),
        fields.optional_number(record, "margin", 0.0),
        tools=read_tools(record.get("tools")),
    )


def parse_ranked(record: Record, chat: bool) -> Alternatives:
    """Reads {prompt, completions[, scores, margin, weight, tools]}, the best first or by scores."""
    given = fields.array(record, "completions")
    if len(given) < 2:
        raise RequestError(f"field 'completions' must hold 2 or more to rank, not {len(given)}")
    at = [f"completions[{i}]" for i in range(len(given))]
    prompt, sides = _read(record, given, at, chat)
    for i, side in enumerate(sides):
        if side in sides[:i]:
            raise RequestError(f"{at[sides.index(side)]} and {at[i]} are equal")
    if record.get("scores") is not None:
        scores = _numbers(record, "scores", len(sides), "completions")
        for i, score in enumerate(scores):
            if score in scores[:i]:
                raise RequestError(
                    f"scores[{scores.index(score)}] and scores[{i}] are equal, which leaves "
                    f"{at[i]} without a rank"
                )
        sides = tuple(sides[i] for i in sorted(range(len(sides)), key=lambda i: -scores[i]))
    return Alternatives(
        prompt,
        sides,
        "ranked",
        _weight(record),
        fields.optional_number(record, "margin", 0.0),
        tools=read_tools(record.get("tools")),
    )


def parse_unpaired(record: Record, chat: bool) -> Alternatives:
    """Reads {prompt, completion, label[, weight, tools]}."""
    given = fields.present(record, "completion")
    prompt, sides = _read(record, [given], ["field 'completion'"], chat)
    label = fields.present(record, "label")
    if not isinstance(label, bool | int | float) or label not in (0, 1):
        raise RequestError(f"field 'label' must be true, false, 1 or 0, not {label!r}")
    return Alternatives(
        prompt,
        sides,
        "unpaired",
        _weight(record),
        label=float(label),
        tools=read_tools(record.get("tools")),
    )


def parse_stepwise(record: Record, chat: bool) -> Steps:
    """Reads {prompt, completions, labels[, weight]}."""
    given = fields.array(record, "completions")
    if not given:
        raise RequestError("field 'completions' is empty, which leaves nothing to train on")
    steps = tuple(
        fields.text_value(step, f"completions[{i}]", filled=True) for i, step in enumerate(given)
    )
    labels = fields.array(record, "labels")
    if all(isinstance(label, bool) for label in labels):
        record = {**record, "labels": [float(label) for label in labels]}
    marks = _numbers(record, "labels", len(steps), "completions", low=0.0, high=1.0)
    prompt = _read_prompt(record, chat)
    if prompt is None:
        fields.present(record, "prompt")
    return Steps(prompt, steps, marks, _weight(record))


def split_pair(pair: Alternatives) -> tuple[Alternatives, ...]:
    """Returns a pair as two unpaired examples, the chosen one wanted and the other not."""
    return tuple(
        Alternatives(pair.prompt, (side,), "unpaired", pair.weight, label=label, tools=pair.tools)
        for side, label in zip(pair.completions, (1.0, 0.0), strict=True)
    )


def common_text(texts: Sequence[str]) -> str:
    """Returns the prompt that texts begin with.

    In dialogues (a turn begins with "\\n\\nHuman:" or "\\n\\nAssistant:") it ends behind the last
    "\\n\\nAssistant:" that they share, and is empty if they share none. In other texts it ends
    where a word does: in front of the last white space behind a word in what they share.

    >>> common_text(["\\n\\nHuman: Hi\\n\\nAssistant: Hello", "\\n\\nHuman: Hi\\n\\nAssistant: He"])
    '\\n\\nHuman: Hi\\n\\nAssistant:'
    >>> common_text(["2 + 2 is 4", "2 + 2 is 41"])
    '2 + 2 is'
    """
    low, high = min(texts), max(texts)
    size = next((i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), len(low))
    shared = low[:size]
    if all(_SPEAKER.match(text) for text in texts):
        found = shared.rfind(_ASSISTANT)
        return shared[: found + len(_ASSISTANT)] if found >= 0 else ""
    ends = [match.end() for match in re.finditer(r"\S(?=\s)", shared)]
    return shared[: ends[-1]] if ends else ""


def common_messages(conversations: Sequence[Messages]) -> Messages:
    """Returns the messages that conversations begin with; each keeps at least its last."""
    shared: list[Mapping[str, Any]] = []
    for turns in zip(*(messages[:-1] for messages in conversations), strict=False):
        if any(turn != turns[0] for turn in turns):
            break
        shared.append(turns[0])
    return tuple(shared)


def _weight(record: Record) -> float:
    return fields.optional_number(record, "weight", 1.0, low=0.0)


def _numbers(record: Record, name: str, count: int, of: str, **bounds: float) -> tuple[float, ...]:
    values = fields.array(record, name)
    if len(values) != count:
        raise RequestError(f"field {name!r} has {len(values)} entries for {count} {of}")
    return tuple(fields.number(v, f"{name}[{i}]", **bounds) for i, v in enumerate(values))


def _read_prompt(record: Record, chat: bool) -> str | Messages | None:
    """Returns the prompt that a record states, or None."""
    if record.get("prompt") is not None:
        prompt = record["prompt"]
        if isinstance(prompt, str):
            return prompt
        messages = read_turns("prompt", prompt)
        if messages[-1]["role"] == "assistant":
            raise RequestError(
                "the last message of field 'prompt' is the assistant's, whose turn comes next"
            )
        return messages
    if "prompt" in record or "instruction" not in record:
        return None
    instruction = fields.text(record, "instruction", filled=True)
    context = fields.text(record, "input", default="")
    if chat:
        return ({"role": "user", "content": instruction_question(instruction, context)},)
    return instruction_prompt(instruction, context)


def _read(
    record: Record, given: Sequence[Any], at: Sequence[str], chat: bool
) -> tuple[str | Messages, tuple[str | Messages, ...]]:
    """Returns the prompt and the completions, both of strings or both of messages."""
    prompt = _read_prompt(record, chat)
    if prompt is None and len(given) == 1:
        fields.present(record, "prompt")
    for side, name in zip(given, at, strict=True):
        if not isinstance(side, str | list):
            raise RequestError(f"{name} must be a string or messages, not {json_type(side)}")
    strings = [isinstance(side, str) for side in given]
    if any(strings) != all(strings):
        other = at[strings.index(False)]
        raise RequestError(f"{other} is no string, though {at[strings.index(True)]} is one")
    if all(strings):
        texts = tuple(
            fields.text_value(side, name, filled=True) for side, name in zip(given, at, strict=True)
        )
        return _with_texts(prompt, texts, at)
    turns = [
        read_turns(name.removeprefix("field ").strip("'"), side)
        for side, name in zip(given, at, strict=True)
    ]
    return _with_turns(prompt, turns, at)


def _with_texts(
    prompt: str | Messages | None, texts: tuple[str, ...], at: Sequence[str]
) -> tuple[str | Messages, tuple[str | Messages, ...]]:
    if prompt is None:
        shared = common_text(texts)
        if not shared.strip():
            raise RequestError(
                f"no field 'prompt', and {' and '.join(at[:2])} do not begin with the same one"
            )
        texts = tuple(text[len(shared) :] for text in texts)
        for text, name in zip(texts, at, strict=True):
            if not text.strip():
                raise RequestError(f"{name} is empty behind the prompt that it shares")
        return shared, texts
    if isinstance(prompt, str):
        return prompt, texts
    return prompt, tuple(({"role": "assistant", "content": text},) for text in texts)


def _with_turns(
    prompt: str | Messages | None, turns: Sequence[Messages], at: Sequence[str]
) -> tuple[Messages, tuple[Messages, ...]]:
    whole = all(messages[0]["role"] != "assistant" for messages in turns)
    if isinstance(prompt, str) and not whole:
        prompt = ({"role": "user", "content": prompt},)
    if not whole:
        if prompt is None:
            raise RequestError("no field 'prompt', and no message before the assistant's")
    elif len(turns) == 1:
        if not isinstance(prompt, str):
            size = len(prompt)
            if turns[0][:size] != prompt or len(turns[0]) == size:
                raise RequestError(f"{at[0]} must begin with the assistant's message")
            turns = [turns[0][size:]]
        else:
            raise RequestError(f"{at[0]} must begin with the assistant's message")
    else:
        shared = common_messages(turns)
        words = (shared[-1].get("content") or "") if shared else ""
        if isinstance(prompt, str):
            if words.strip() != prompt.strip():
                raise RequestError(
                    f"field 'prompt' is not the last message that {' and '.join(at[:2])} share"
                )
        elif prompt is not None and shared != prompt:
            raise RequestError(f"field 'prompt' is not what {' and '.join(at[:2])} begin with")
        prompt, turns = shared, [messages[len(shared) :] for messages in turns]
    for messages, name in zip(turns, at, strict=True):
        if messages[0]["role"] != "assistant":
            raise RequestError(
                f"{name} goes on with the {messages[0]['role']}'s message where the "
                "assistant's must come"
            )
        if messages[-1]["role"] != "assistant":
            raise RequestError(
                f"the last message of {name} must be the assistant's, not the "
                f"{messages[-1]['role']}'s"
            )
    return prompt, tuple(turns)
