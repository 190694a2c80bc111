"""Conversations: the ways in which people keep them become one, and defects are named."""

from __future__ import annotations

import json

import pytest

from jaxtune.core.errors import RequestError
from jaxtune.data.formats import parse
from jaxtune.data.sources import open_source

CALL = {"name": "moon", "arguments": {"day": 3}}
WRAPPED = {"type": "function", "function": CALL}


def messages_of(record) -> list[dict]:
    return list(parse(record, "chat").messages)


def sharegpt(*turns, **fields) -> dict:
    return {"conversations": [{"from": s, "value": v} for s, v in turns], **fields}


def parts(*pairs) -> list[dict]:
    return [{"type": kind, "value": value} for kind, value in pairs]


def test_sharegpt_becomes_messages():
    tools = json.dumps([{"name": "moon", "parameters": {}}])
    record = sharegpt(
        ("human", "Look"),
        ("function_call", json.dumps(CALL)),
        ("observation", "bright"),
        ("gpt", "It shines."),
        tools=tools,
        system="You are a cat.",
    )
    talk = parse(record, "chat")
    assert list(talk.messages) == [
        {"role": "system", "content": "You are a cat."},
        {"role": "user", "content": "Look"},
        {"role": "assistant", "content": None, "tool_calls": [WRAPPED]},
        {"role": "tool", "content": "bright"},
        {"role": "assistant", "content": "It shines."},
    ]
    assert talk.tools == ({"type": "function", "function": {"name": "moon", "parameters": {}}},)
    several = sharegpt(("human", "q"), ("function_call", json.dumps([CALL, CALL])))
    assert messages_of(several)[1]["tool_calls"] == [WRAPPED, WRAPPED]
    for none in ("", "[]", None):
        assert parse(sharegpt(("human", "q"), ("gpt", "a"), tools=none), "chat").tools == ()
    both = {
        "conversations": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    }
    assert messages_of(both) == both["conversations"]


def test_typed_parts_become_text_thoughts_and_calls():
    content = parts(
        ("reasoning", "Hm."), ("text", "Wait"), ("text", "."), ("tool_call", json.dumps(CALL))
    )
    record = {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "Look"}]},
            {"role": "assistant", "content": content},
            {"role": "tool", "content": parts(("text", "dark"))},
            {
                "role": "assistant",
                "content": [{"type": "thinking", "thinking": "So."}, *parts(("text", "Gone."))],
            },
        ],
        "tools": json.dumps([WRAPPED]),
    }
    talk = parse(record, "chat")
    assert list(talk.messages) == [
        {"role": "user", "content": "Look"},
        {
            "role": "assistant",
            "content": "Wait.",
            "reasoning_content": "Hm.",
            "tool_calls": [WRAPPED],
        },
        {"role": "tool", "content": "dark"},
        {"role": "assistant", "content": "Gone.", "reasoning_content": "So."},
    ]
    assert talk.tools == (WRAPPED,)


def test_arguments_as_json_text_become_objects():
    def call(arguments):
        given = {"id": "x", "type": "function", "function": {"name": "f", "arguments": arguments}}
        record = {
            "messages": [
                {"role": "user", "content": "q"},
                {"role": "assistant", "tool_calls": [given]},
            ]
        }
        return messages_of(record)[1]["tool_calls"][0]

    assert call('{"a": 1}') == {
        "id": "x",
        "type": "function",
        "function": {"name": "f", "arguments": {"a": 1}},
    }
    assert call("")["function"]["arguments"] == {} == call({})["function"]["arguments"]
    with pytest.raises(RequestError, match=r"tool_calls\[0\].arguments is not valid JSON"):
        call("{a}")


def weighted(weight, role="assistant", name="loss_weight"):
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    turns[role == "assistant"][name] = weight
    return {"messages": turns}


def test_weights():
    for weight in (0, 1, 0.25, 3):
        assert messages_of(weighted(weight))[1]["loss_weight"] == float(weight)
        assert messages_of(weighted(weight, name="weight"))[1]["loss_weight"] == float(weight)
    assert "loss_weight" not in messages_of(weighted(None))[1]
    assert messages_of(weighted(0.0, "user"))[0]["loss_weight"] == 0.0


user, bot = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
BAD = {
    "negative weight": (weighted(-1), "not negative, not -1"),
    "infinite weight": (weighted(float("inf")), "finite number"),
    "nan weight": (weighted(float("nan")), "finite number"),
    "weight a string": (weighted("1"), "finite number"),
    "weight a boolean": (weighted(True), "finite number"),
    "the user's weight": (weighted(1.0, "user"), "only the assistant's words are trained"),
    "unknown speaker": (sharegpt(("humam", "q"), ("gpt", "a")), "did you mean 'human'"),
    "no value": ({"conversations": [{"from": "human", "text": "q"}]}, "no field 'value'"),
    "value a number": (sharegpt(("human", 3), ("gpt", "a")), r"conversations\[0\].content must"),
    "conversations an object": ({"conversations": {}}, "must be an array"),
    "conversations empty": ({"conversations": []}, "nothing to train"),
    "human last": (sharegpt(("human", "q"), ("gpt", "a"), ("human", "q")), "last message"),
    "observation early": (sharegpt(("human", "q"), ("observation", "r")), "must follow"),
    "call not JSON": (sharegpt(("human", "q"), ("function_call", "f(x)")), "not valid JSON"),
    "call without a name": (sharegpt(("human", "q"), ("function_call", "{}")), "with a name"),
    "call a number": (sharegpt(("human", "q"), ("function_call", "3")), "array of objects"),
    "call null": (sharegpt(("human", "q"), ("function_call", None)), "must be a string"),
    "tools not JSON": ({"messages": [user, bot], "tools": "[{]"}, "'tools' is not valid JSON"),
    "tools an object": ({"messages": [user, bot], "tools": "{}"}, "must be an array of objects"),
    "unknown part": (
        {"messages": [{"role": "user", "content": parts(("image", "x"))}, bot]},
        r"content\[0\] has type 'image'.*text, reasoning",
    ),
    "part a string": ({"messages": [{"role": "user", "content": ["x"]}, bot]}, "must be an object"),
    "part without text": (
        {"messages": [{"role": "user", "content": [{"type": "text"}]}, bot]}, "hold a string",
    ),
    "the user's thoughts": (
        {"messages": [{"role": "user", "content": parts(("thinking", "x"))}, bot]},
        "is a thinking of the user",
    ),
    "empty parts": (
        {"messages": [user, {"role": "assistant", "content": parts(("text", " "))}]}, "nothing to",
    ),
    "thoughts a number": ({"messages": [user, {**bot, "reasoning_content": 3}]}, "be a string"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_malformed_conversation_is_refused_with_its_place(case):
    record, message = BAD[case]
    with pytest.raises(RequestError, match=message) as error:
        parse(record, "chat", where="data.jsonl:7", key="data.train[0]")
    assert (error.value.where, error.value.key) == ("data.jsonl:7", "data.train[0]")


def test_real_conversations(shared):
    folder = shared / "data" / "instruction"
    roles, calls, thoughts = set(), 0, 0
    for name in (
        "glaive_toolcall_en_demo.json.gz",
        "reason_tool_use_50.jsonl.gz",
        "v1_sft_demo_loss_weights.jsonl.gz",
    ):
        source = open_source(f"jsonl:{folder / name}")
        for index in range(len(source)):
            talk = parse(source[index], "chat", where=source.where(index))
            roles |= {m["role"] for m in talk.messages}
            calls += sum(len(m.get("tool_calls") or ()) for m in talk.messages)
            thoughts += sum("reasoning_content" in m for m in talk.messages)
    assert roles == {"system", "user", "assistant", "tool"}
    assert (calls, thoughts) == (211 + 68, 59 + 41 + 9 + 3)
