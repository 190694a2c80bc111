"""Conversations as people keep them, read strictly into messages that chat templates take.

Three ways of writing a turn are read: OpenAI's and Hugging Face's `{role, content}`, the same with
`content` as a list of typed parts, and ShareGPT's `{from, value}` under `conversations`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxtune.core.errors import RequestError, nearest
from jaxtune.data.sources import Record, json_type

ROLES = ("system", "developer", "user", "assistant", "tool")
_SHAREGPT = {
    "system": "system", "human": "user", "user": "user", "gpt": "assistant",
    "assistant": "assistant", "function_call": "assistant", "observation": "tool", "tool": "tool",
}  # fmt: skip
_PARTS = {"text": "text", "reasoning": "reasoning", "thinking": "reasoning", "tool_call": "call"}
# Ours and LLaMA-Factory's name for a turn's weight, and OpenAI's.
_WEIGHTS = ("loss_weight", "weight")


@dataclass(frozen=True)
class Conversation:
    """Messages that end with the assistant's, and the tools offered.

    Attributes:
        messages: `{role, content, ...}` each. `content` is a string, or None beside `tool_calls`;
            `reasoning_content` holds thoughts, `loss_weight` the weight of a turn's targets.
        tools: JSON schemas of functions.
    """

    messages: tuple[Mapping[str, Any], ...]
    tools: tuple[Mapping[str, Any], ...] = ()


def parse_chat(record: Record) -> Conversation:
    """Reads the conversation of a record.

    Raises:
        RequestError: something is missing, of a wrong type or empty, or roles are out of order.
    """
    name = "messages"
    if name not in record:
        if "conversations" not in record:
            have = ", ".join(map(str, record)) or "none"
            near = nearest(name, [str(field) for field in record])
            raise RequestError(f"no field 'messages' among its fields: {have}{near}")
        name = "conversations"
    turns = record[name]
    messages = _read_list(name, turns)
    system = record.get("system") if name == "conversations" else None
    if isinstance(system, str) and system.strip():
        messages.insert(0, {"role": "system", "content": system})
    for i, message in enumerate(messages):
        at = f"{name}[{i - len(messages) + len(turns)}]"
        _check_order(at, message, messages[i - 1]["role"] if i else None)
    if messages[-1]["role"] != "assistant":
        raise RequestError(
            f"the last message must be the assistant's, not the {messages[-1]['role']}'s"
        )
    return Conversation(tuple(messages), read_tools(record.get("tools"), name))


def read_turns(name: str, turns: Any) -> tuple[Mapping[str, Any], ...]:
    """Reads the messages of a field, a part of a conversation, whoever speaks last.

    Raises:
        RequestError: as for `parse_chat`.
    """
    messages = _read_list(name, turns)
    for i, message in enumerate(messages):
        # What comes before a field's first message is not known here.
        if i or message["role"] not in ("system", "developer", "tool"):
            _check_order(f"{name}[{i}]", message, messages[i - 1]["role"] if i else None)
    return tuple(messages)


def _read_list(name: str, turns: Any) -> list[dict[str, Any]]:
    if not isinstance(turns, list):
        raise RequestError(f"field {name!r} must be an array, not {json_type(turns)}")
    if not turns:
        raise RequestError(f"field {name!r} is empty, which leaves nothing to train on")
    return [_read_message(f"{name}[{i}]", turn) for i, turn in enumerate(turns)]


def read_tools(tools: Any, name: str = "messages") -> tuple[Mapping[str, Any], ...]:
    """Reads the tools offered, an array of JSON schemas or its JSON text, of a field `tools`.

    Args:
        tools: the field's value.
        name: of the field with the messages; ShareGPT's `conversations` list bare functions.

    Raises:
        RequestError: it is neither.
    """
    if isinstance(tools, str):
        tools = _json("field 'tools'", tools) if tools.strip() else None
    tools = [] if tools is None else tools
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RequestError("field 'tools' must be an array of objects, or the JSON text of one")
    if name == "conversations":
        # ShareGPT lists bare functions; chat templates and servers expect OpenAI's wrapping.
        tools = [t if "function" in t else {"type": "function", "function": t} for t in tools]
    return tuple(tools)


def _read_message(at: str, turn: Any) -> dict[str, Any]:
    if not isinstance(turn, dict):
        raise RequestError(f"{at} must be an object, not {json_type(turn)}")
    if at.startswith("conversations") and "from" in turn:
        message = _from_sharegpt(at, turn)
    else:
        for name in ("role", "content"):
            if name not in turn and not (name == "content" and turn.get("tool_calls")):
                near = nearest(name, [str(field) for field in turn])
                raise RequestError(f"{at} has no field {name!r}{near}")
        message = dict(turn)
    role = message["role"]
    if not isinstance(role, str) or role not in ROLES:
        near = nearest(str(role), ROLES)
        raise RequestError(f"{at} has role {role!r}{near}; valid are {', '.join(ROLES)}")
    if isinstance(message.get("content"), list) and message["content"]:
        message |= _read_parts(at, message["content"], role)
    if message.get("tool_calls") is not None:
        message["tool_calls"] = _read_calls(at, message["tool_calls"], role)
    _check_content(at, message)
    weight = _read_weight(at, message)
    if weight is not None:
        message["loss_weight"] = weight
    return message


def _from_sharegpt(at: str, turn: Mapping[str, Any]) -> dict[str, Any]:
    speaker, value = turn["from"], turn.get("value")
    if not isinstance(speaker, str) or speaker not in _SHAREGPT:
        near = nearest(str(speaker), _SHAREGPT)
        raise RequestError(f"{at} is from {speaker!r}{near}; valid are {', '.join(_SHAREGPT)}")
    if "value" not in turn:
        near = nearest("value", [str(field) for field in turn])
        raise RequestError(f"{at} has no field 'value'{near}")
    message = {k: v for k, v in turn.items() if k not in ("from", "value")}
    if speaker == "function_call":
        if not isinstance(value, str):
            raise RequestError(f"{at}.value must be a string, not {json_type(value)}")
        calls = _json(f"{at}.value", value)
        calls = calls if isinstance(calls, list) else [calls]
        return message | {"role": "assistant", "content": None, "tool_calls": calls}
    return message | {"role": _SHAREGPT[speaker], "content": value}


def _read_parts(at: str, parts: list[Any], role: str) -> dict[str, Any]:
    """Joins typed parts: texts, the assistant's thoughts, and its tool calls."""
    found: dict[str, list[Any]] = {"text": [], "reasoning": [], "call": []}
    for i, part in enumerate(parts):
        here = f"{at}.content[{i}]"
        if not isinstance(part, dict):
            raise RequestError(f"{here} must be an object, not {json_type(part)}")
        kind = part.get("type")
        if kind not in _PARTS:
            near = nearest(str(kind), _PARTS)
            raise RequestError(f"{here} has type {kind!r}{near}; valid are {', '.join(_PARTS)}")
        value = next((part[name] for name in ("value", kind, "text") if name in part), None)
        if _PARTS[kind] == "call":
            value = _json(here, value) if isinstance(value, str) else value
        elif not isinstance(value, str):
            raise RequestError(f"{here} must hold a string, not {json_type(value)}")
        if kind != "text" and role != "assistant":
            raise RequestError(f"{here} is a {kind} of the {role}; only the assistant's are read")
        found[_PARTS[kind]].append(value)
    message: dict[str, Any] = {"content": "".join(found["text"])}
    if found["reasoning"]:
        message["reasoning_content"] = "".join(found["reasoning"])
    if found["call"]:
        message["tool_calls"] = found["call"]
    return message


def _read_calls(at: str, calls: Any, role: str) -> list[dict[str, Any]]:
    """Checks tool calls and gives them the one form `{type, function: {name, arguments}}`."""
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise RequestError(f"{at}.tool_calls must be an array of objects")
    if calls and role != "assistant":
        raise RequestError(f"{at} has tool_calls but is the {role}'s; only the assistant calls")
    out = []
    for i, call in enumerate(calls):
        here = f"{at}.tool_calls[{i}]"
        function = call.get("function", call)
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RequestError(f"{here} has no function with a name")
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            # OpenAI keeps them as JSON text; templates write an object as JSON themselves.
            arguments = _json(f"{here}.arguments", arguments) if arguments.strip() else {}
        if arguments is not None and not isinstance(arguments, dict):
            raise RequestError(f"{here}.arguments must be an object, not {json_type(arguments)}")
        if arguments is not None:
            function = {**function, "arguments": arguments}
        rest = call if "function" in call else {}
        out.append({"type": "function", **rest, "function": function})
    return out


def _check_content(at: str, message: Mapping[str, Any]) -> None:
    content, calls = message.get("content"), message.get("tool_calls")
    if not isinstance(content, str) and not (content is None and calls):
        raise RequestError(
            f"{at}.content must be a string or an array of parts, not {json_type(content)}"
            if content != []
            else f"{at}.content is an empty array"
        )
    reasoning = message.get("reasoning_content")
    if reasoning is not None and not isinstance(reasoning, str):
        raise RequestError(f"{at}.reasoning_content must be a string, not {json_type(reasoning)}")
    words = (content or "").strip() or (reasoning or "").strip()
    if message["role"] == "assistant" and not words and not calls:
        raise RequestError(f"{at}.content is empty, which leaves nothing to train on")


def _read_weight(at: str, message: dict[str, Any]) -> float | None:
    given = {name: message.pop(name) for name in _WEIGHTS if name in message}
    name, value = next(((k, v) for k, v in given.items() if v is not None), ("", None))
    if value is None:
        return None
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value < 0:
        raise RequestError(
            f"{at}.{name} must be a finite number that is not negative, not {value!r}"
        )
    if value and message["role"] != "assistant":
        raise RequestError(
            f"{at}.{name} is {value!r}, but only the assistant's words are trained; give 0 or "
            "leave it out"
        )
    return float(value)


def _check_order(at: str, message: Mapping[str, Any], before: str | None) -> None:
    role = message["role"]
    if role in ("system", "developer") and before is not None:
        raise RequestError(f"{at} is the {role} message, which must come first")
    if role == "tool" and before not in ("assistant", "tool"):
        raise RequestError(f"{at} is a tool's answer, which must follow the assistant's message")


def _json(at: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{at} is not valid JSON: {error}") from error
