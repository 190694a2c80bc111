"""Formats: what a record becomes, and what each malformed one is told."""

from __future__ import annotations

import pytest

from jaxtune.core.errors import RequestError
from jaxtune.data.formats import (
    FORMATS,
    Completion,
    Conversation,
    Text,
    Tokens,
    instruction_prompt,
    parse,
)

U, A = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}


def test_each_format():
    assert parse({"text": "x", "id": 3}, "text") == Text("x")
    assert parse({"prompt": "", "completion": "y"}, "completion") == Completion("", "y")
    assert parse({"input_ids": [1, 2]}, "tokens") == Tokens((1, 2))
    weighted = parse({"input_ids": [1, 2], "loss_mask": [0, 0.5]}, "tokens")
    assert weighted == Tokens((1, 2), (0.0, 0.5))
    talk = parse({"messages": [U, CALL, {"role": "tool", "content": "r"}, A]}, "chat")
    assert isinstance(talk, Conversation) and len(talk.messages) == 4 and talk.tools == ()
    tools = [{"type": "function"}]
    assert parse({"messages": [U, A], "tools": tools}, "chat").tools == tuple(tools)


def test_an_instruction_becomes_a_conversation_only_with_a_template():
    record = {"instruction": "Add.", "input": "1 2", "output": "3"}
    assert parse(record, "instruction") == Completion(
        "### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n", "3"
    )
    talk = parse(record, "instruction", chat=True)
    assert [m["content"] for m in talk.messages] == ["Add.\n\n1 2", "3"]
    for empty in ({"input": ""}, {"input": None}, {}):
        record = {"instruction": "Go.", "output": "ok"} | empty
        assert parse(record, "instruction").prompt == instruction_prompt("Go.", "")
        assert parse(record, "instruction", chat=True).messages[0]["content"] == "Go."


def bad_chat(*messages):
    return ("chat", {"messages": list(messages)})


BAD = {
    "unknown format": ("chatt", {}, "did you mean 'chat'"),
    "text missing": ("text", {"txt": "x"}, "no field 'text'.*did you mean 'txt'"),
    "text of a wrong type": ("text", {"text": 3}, "must be a string, not number"),
    "text null": ("text", {"text": None}, "must be a string, not null"),
    "text empty": ("text", {"text": " \n"}, "nothing to train"),
    "prompt missing": ("completion", {"completion": "x"}, "no field 'prompt'"),
    "completion empty": ("completion", {"prompt": "x", "completion": ""}, "nothing to train"),
    "output missing": ("instruction", {"instruction": "x", "response": "y"}, "no field 'output'"),
    "output empty": ("instruction", {"instruction": "x", "output": ""}, "nothing to train"),
    "input a list": (
        "instruction", {"instruction": "x", "input": [], "output": "y"}, "not array",
    ),
    "messages missing": ("chat", {"massages": []}, "no field 'messages'.*did you mean"),
    "messages an object": ("chat", {"messages": {}}, "must be an array"),
    "messages empty": ("chat", {"messages": []}, "nothing to train"),
    "message a string": (*bad_chat("hi"), r"messages\[0\] must be an object"),
    "role missing": (*bad_chat({"from": "user", "content": "x"}), "no field 'role'"),
    "content missing": (*bad_chat({"role": "user", "value": "x"}), "no field 'content'"),
    "role unknown": (*bad_chat({"role": "asistant", "content": "x"}), "did you mean 'assistant'"),
    "role a number": (*bad_chat({"role": 1, "content": "x"}), "has role 1"),
    "content a list": (*bad_chat({"role": "user", "content": []}, A), "an empty array"),
    "content null": (*bad_chat({"role": "user", "content": None}, A), "not null"),
    "answer empty": (*bad_chat(U, {"role": "assistant", "content": " "}), "nothing to train"),
    "user last": (*bad_chat(U, A, U), "last message must be the assistant's"),
    "system late": (*bad_chat(U, {"role": "system", "content": "x"}, A), "must come first"),
    "tool first": (*bad_chat({"role": "tool", "content": "x"}, A), "must follow"),
    "tool after user": (*bad_chat(U, {"role": "tool", "content": "x"}, A), "must follow"),
    "user calls": (*bad_chat({**CALL, "role": "user"}, A), "only the assistant"),
    "calls a string": (*bad_chat(U, {**A, "tool_calls": "f"}), "tool_calls must be an array"),
    "tools a string": ("chat", {"messages": [U, A], "tools": "f"}, "'tools' is not valid JSON"),
    "ids missing": ("tokens", {"ids": [1]}, "no field 'input_ids'"),
    "ids floats": ("tokens", {"input_ids": [1.0]}, "array of integers"),
    "ids booleans": ("tokens", {"input_ids": [True, 2]}, "array of integers"),
    "ids empty": ("tokens", {"input_ids": []}, "nothing to train"),
    "mask short": ("tokens", {"input_ids": [1, 2], "loss_mask": [1]}, "1 entries for 2"),
    "mask strings": ("tokens", {"input_ids": [1], "loss_mask": ["1"]}, "array of numbers"),
    "mask negative": ("tokens", {"input_ids": [1], "loss_mask": [-1]}, "not negative"),
    "mask infinite": ("tokens", {"input_ids": [1], "loss_mask": [float("inf")]}, "finite"),
    "mask huge": ("tokens", {"input_ids": [1], "loss_mask": [10**400]}, "finite"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_malformed_record_is_refused_with_its_place(case):
    format, record, message = BAD[case]
    with pytest.raises(RequestError, match=message) as error:
        parse(record, format, where="data.jsonl:7", key="data.train[0]")
    assert error.value.key == "data.train[0]"
    if format in FORMATS:
        assert error.value.where == "data.jsonl:7"
