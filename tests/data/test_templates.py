"""Published templates: golden masks, and real conversations against the plainest way to mask."""

from __future__ import annotations

import copy
import dataclasses
import json
import re

import numpy as np
import pytest

from jaxtune.core.errors import RequestError
from jaxtune.data.chat import render_chat, render_prompt
from jaxtune.data.prepare import prepare
from jaxtune.data.sources import open_source
from jaxtune.data.store import tokenize
from tests.goldens import templates as goldens

from .conftest import TEMPLATES
from .test_chat import MULTI, SINGLE, published, talk, template_ids, trained

GOLDEN = json.loads(goldens.FILE.read_text())
INLINE = "<think>\nHm.\n</think>"
# Like Qwen 3's in what matters: thoughts in a field, kept for the last turn only.
_THOUGHTS = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['reasoning_content'] "
    "and loop.last %}{{ '<think>\n' + m['reasoning_content'] + '\n</think>\n\n' }}{% endif %}"
    "{{ m['content'] }}{% for c in m['tool_calls'] or [] %}{{ '\n' + c['function']['name'] }}"
    "{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# As gpt-oss's in what matters: every message ends with the same token, and the last answer with
# another; only the last answer keeps its thoughts.
_HARMONY = (
    "{{ '<|start|>system<|message|>You.<|end|>' }}"
    "{% for m in messages %}{{ '<|start|>' + m['role'] }}"
    "{% if m['role'] != 'assistant' %}{{ '<|message|>' + m['content'] + '<|end|>' }}{% else %}"
    "{% if loop.last and m['thinking'] %}{{ '<|channel|>analysis<|message|>' + m['thinking'] + "
    "'<|end|><|start|>assistant' }}{% endif %}{{ '<|channel|>final<|message|>' + m['content'] }}"
    "{{ '<|return|>' if loop.last else '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
)


def marked(tokenizer, rendered) -> str:
    """The text of the tokens, with ⟦ ⟧ around runs of trained ones."""
    edges = np.flatnonzero(np.diff(rendered.mask > 0, prepend=False, append=False))
    pieces = [tokenizer.decode(part) for part in np.split(rendered.ids, edges)]
    return "".join(f"⟦{piece}⟧" if i % 2 else piece for i, piece in enumerate(pieces))


@pytest.mark.parametrize("name", goldens.TURNS)
def test_golden_masks(name, tokenizer, shared):  # C4, C5, C7, C8, C9
    folder = shared / "data" / "tokenizers" / "chat_templates"
    chat = tokenizer.with_template(goldens.template_of(folder, name))
    for case, messages in goldens.talks_of(name).items():
        tools = goldens.tools_of(case)
        rendered = render_chat(messages, chat, tools)
        assert rendered.ids.tolist() == template_ids(chat, messages, tools)
        assert marked(chat, rendered) == GOLDEN[name][case]
        prompt = template_ids(chat, messages[:-1], tools, add_generation_prompt=True)
        assert render_prompt(messages[:-1], chat, tools) == prompt


def test_a_message_end_that_all_roles_share_is_trained_after_an_answer(tokenizer):  # C5, C7
    """One terminator a turn: `<|end|>` of earlier ones, `<|return|>` of the last."""
    hf = copy.deepcopy(tokenizer.hf)
    names = ("return", "start", "channel", "message")
    hf.add_special_tokens({"additional_special_tokens": [f"<|{name}|>" for name in names]})
    chat = dataclasses.replace(tokenizer, hf=hf).with_template(_HARMONY)
    messages = [*MULTI[:3], MULTI[3] | {"thinking": "Hm."}]
    rendered = render_chat(messages, chat)
    assert rendered.ids.tolist() == template_ids(chat, messages)
    assert marked(chat, rendered) == (
        "<|start|>system<|message|>You.<|end|><|start|>user<|message|>Hello<|end|><|start|>assistant"
        "⟦<|channel|>final<|message|>Hi there<|end|>⟧<|start|>user<|message|>What is it?<|end|>"
        "<|start|>assistant⟦<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>"
        "final<|message|>The moon, of course.<|return|>⟧"
    )
    # thoughts end with <|end|> too, so that generation goes on there
    end, last = (hf.convert_tokens_to_ids(f"<|{name}|>") for name in ("end", "return"))
    assert last in chat.eos_ids and end not in chat.eos_ids


def test_a_header_that_all_roles_share_closes_nothing(tokenizer):
    """Its first token follows an answer as well, and is the next turn's."""
    opened = tokenizer.with_template(
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}{% endfor %}"
        "{{ '<|im_start|>assistant\n' if add_generation_prompt else eos_token }}"
    )
    assert trained(opened, render_chat(MULTI, opened)) == "Hi there|The moon, of course.</s>"


def test_thoughts_stand_before_the_words_where_the_template_has_no_place_for_them(tokenizer):
    messages = talk(("user", "Hello"), ("assistant", "Hi"))
    messages[1]["reasoning_content"] = "Hm."
    chat = tokenizer.with_template(TEMPLATES["chatml"])
    assert trained(chat, render_chat(messages, chat)) == f"{INLINE}\n\nHi<|im_end|>"
    knows = tokenizer.with_template(_THOUGHTS)
    assert trained(knows, render_chat(messages, knows)) == f"{INLINE}\n\nHi<|im_end|>"
    assert "reasoning_content" in messages[1]  # what was given is left alone


def test_a_call_among_earlier_turns_whose_thoughts_are_dropped(tokenizer):
    """No shorter conversation is a prefix of the whole, and the turn has no words to look for."""
    chat = tokenizer.with_template(_THOUGHTS)
    call = {"type": "function", "function": {"name": "moon", "arguments": {}}}
    think = {"reasoning_content": "Hm."}
    messages = [
        {"role": "user", "content": "Look"},
        {"role": "assistant", "content": "", "tool_calls": [call], **think},
        {"role": "tool", "content": "dark"},
        {"role": "assistant", "content": "", "tool_calls": [call], **think},
        {"role": "tool", "content": "dark"},
        {"role": "assistant", "content": "Gone", **think},
    ]
    text = trained(chat, render_chat(messages, chat))
    assert text == f"\nmoon<|im_end|>|\nmoon<|im_end|>|{INLINE}\n\nGone<|im_end|>"


@pytest.mark.parametrize("name", TEMPLATES)
def test_an_answer_that_brings_its_terminator_gets_no_second(name, chat):  # C5
    tokenizer = chat(name)
    end = tokenizer.turn_end
    for messages in (SINGLE, MULTI):
        closed = [{**m, "content": m["content"] + (end + "\n") * (m["role"] == "assistant")}
                  for m in messages]  # fmt: skip
        plain, rendered = (render_chat(m, tokenizer) for m in (messages, closed))
        np.testing.assert_array_equal(plain.ids, rendered.ids)
        np.testing.assert_array_equal(plain.mask, rendered.mask)
        assert render_prompt(closed[:-1], tokenizer) == render_prompt(messages[:-1], tokenizer)
    for content, words in ((f"a{end}b", r"messages\[1\] holds"), (f" {end}", "nothing but")):
        with pytest.raises(RequestError, match=words):
            render_chat(talk(("user", "q"), ("assistant", content)), tokenizer)


def test_weights_scale_a_turns_targets(chat, tmp_path, write_jsonl):
    tokenizer = chat("chatml")
    plain = render_chat(MULTI, tokenizer)
    messages = [dict(m) for m in MULTI]
    messages[1]["loss_weight"], messages[3]["loss_weight"] = 0.0, 0.25
    rendered = render_chat(messages, tokenizer)
    np.testing.assert_array_equal(rendered.ids, plain.ids)
    first, second = np.split(np.flatnonzero(plain.mask), [len(tokenizer.encode("Hi there"))])
    assert trained(tokenizer, rendered) == "The moon, of course.<|im_end|>"
    assert set(rendered.mask[second]) == {0.25} and not rendered.mask[first].any()
    # The end of sequence that closes a template without terminator belongs to the last turn.
    last = render_chat(messages, chat("no_terminator"))
    assert last.ids[-1] == tokenizer.eos_id and last.mask[-1] == 0.25
    nothing = [dict(m, loss_weight=0) for m in MULTI]
    source = open_source(write_jsonl(tmp_path / "a.jsonl", [{"messages": nothing}]))
    with pytest.raises(RequestError, match="no token of this example is trained") as error:
        tokenize(source, "chat", tokenizer, seq_len=256)
    assert error.value.where == f"{tmp_path / 'a.jsonl'}:1"


def test_prepared_conversations_are_what_they_were(tmp_path, write_jsonl):
    records = [
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "value": "q"}]},
                      {"role": "assistant", "content": "a", "loss_weight": 0.5}], "tools": "[]"},
    ]  # fmt: skip
    source = write_jsonl(tmp_path / "a.jsonl", records)
    made = prepare(source, "chat", tmp_path / "out", "talks")
    back = open_source(f"tfds:{tmp_path / 'out' / 'talks'}:train")
    assert made["splits"] == {"train": 2} and [back[0], back[1]] == records


# Files, and how many of their records are rendered here.
REAL = {
    "glaive_toolcall_en_demo.json.gz": 60,
    "reason_tool_use_50.jsonl.gz": 30,
    "v1_sft_demo_loss_weights.jsonl.gz": 60,
}


def first_of(shared, name):
    source = open_source(f"jsonl:{shared / 'data' / 'instruction' / name}")
    return dataclasses.replace(source, size=REAL[name])


@pytest.mark.parametrize("template", ["qwen2.5-instruct", "qwen3"])
@pytest.mark.parametrize("name", REAL)
def test_real_conversations(name, template, shared):  # C5, C7, C8, C9
    folder = shared / "data" / "tokenizers"
    text = goldens.template_of(folder / "chat_templates", template)
    chat = published(folder / "minimind").with_template(text)
    store = tokenize(first_of(shared, name), "chat", chat, seq_len=8192)
    begin, end = (chat.encode(t, special=False) for t in ("<|im_start|>assistant\n", "<|im_end|>"))
    for index in range(len(store)):
        ids, mask = store.example(index)
        expected, inside = np.zeros(len(ids)), False
        for at, token in enumerate(ids.tolist()):
            expected[at] = inside
            if inside:
                inside = [token] != end
            elif token == begin[-1]:
                inside = ids[max(0, at + 1 - len(begin)) : at + 1].tolist() == begin
        np.testing.assert_array_equal(mask, expected, err_msg=store.where(index))


def test_every_tool_call_and_thought_is_in_the_text(shared):
    """What typed parts hold is written, under a template with a place for it and without."""
    folder = shared / "data" / "tokenizers"
    source = first_of(shared, "reason_tool_use_50.jsonl.gz")
    for template in ("qwen2.5-instruct", "qwen3"):
        text = goldens.template_of(folder / "chat_templates", template)
        chat = published(folder / "minimind").with_template(text)
        store = tokenize(source, "chat", chat, seq_len=8192)
        for index in range(len(store)):
            ids, mask = store.example(index)
            words = chat.decode(ids[mask > 0])
            turns = [m for m in source[index]["messages"] if m["role"] == "assistant"]
            for number, turn in enumerate(turns):
                for part in turn["content"]:
                    if part["type"] == "text":
                        assert part["value"].strip() in words
                    elif part["type"] == "tool_call":
                        assert json.loads(part["value"])["name"] in words
                    elif template != "qwen3" or number == len(turns) - 1:
                        assert part["value"].strip("\n") in words
            calls = re.findall(r"<tool_call>\n(.*?)\n</tool_call>", words, re.DOTALL)
            assert all("name" in json.loads(call) for call in calls)
