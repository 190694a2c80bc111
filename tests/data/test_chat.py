"""Rendering: ids are the template's, and the trained tokens are the assistant's words."""

from __future__ import annotations

import functools
import gzip
import json
import re
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxtune.core.errors import RequestError
from jaxtune.data.chat import (
    ROLE_NAMES,
    render_chat,
    render_completion,
    render_prompt,
    render_text,
)
from jaxtune.data.template import read_template
from jaxtune.data.tokenizer import load_tokenizer

from .conftest import TEMPLATES, write_tokenizer

U, A, S, T = "user", "assistant", "system", "tool"


def talk(*turns: tuple[str, str]) -> list[dict]:
    return [{"role": role, "content": content} for role, content in turns]


SINGLE = talk((U, "What is the capital?"), (A, "Paris."))
MULTI = talk((U, "Hello"), (A, "Hi there"), (U, "What is it?"), (A, "The moon, of course."))
SYSTEM = talk((S, "You are a cat."), (U, "Hello"), (A, "Meow"), (U, "Again"), (A, "Meow meow"))

# The trained text of SINGLE, MULTI: written by hand from each template.
GOLDEN = {
    "chatml": ("Paris.<|im_end|>", "Hi there<|im_end|>|The moon, of course.<|im_end|>"),
    "llama3": ("Paris.<|eot_id|>", "Hi there<|eot_id|>|The moon, of course.<|eot_id|>"),
    "mistral": (" Paris.</s>", " Hi there</s>| The moon, of course.</s>"),
    "gemma": ("Paris.<end_of_turn>", "Hi there<end_of_turn>|The moon, of course.<end_of_turn>"),
    "phi3": ("Paris.<|end|>", "Hi there<|end|>|The moon, of course.<|end|>"),
    "thinking": (
        "<think>\n\n</think>\n\nParis.<|im_end|>",
        "Hi there<|im_end|>|<think>\n\n</think>\n\nThe moon, of course.<|im_end|>",
    ),
    "opens_think": ("Paris.</s>", "Hi there</s>|The moon, of course.</s>"),
    "moves_system": (" Paris.</s>", " Hi there</s>| The moon, of course.</s>"),
    "no_terminator": ("Paris.\n\n</s>", "Hi there\n\n|The moon, of course.\n\n</s>"),
    # This prompt ends with a space, which may share a token with the answer's first letters.
    "eos_at_end": (" Paris.</s>", "Hi there|The moon, of course.</s>"),
}


def trained(tokenizer, rendered) -> str:
    """Text of each run of trained tokens, joined by |."""
    runs, last = [], -2
    for at in np.flatnonzero(rendered.mask):
        if at != last + 1:
            runs.append([])
        runs[-1].append(rendered.ids[at])
        last = at
    return "|".join(tokenizer.decode(run) for run in runs)


def template_ids(tokenizer, messages, tools=None, **kwargs) -> list[int]:
    return tokenizer.hf.apply_chat_template(
        messages, tools=tools, tokenize=True, return_dict=False, **kwargs
    )


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("messages", [SINGLE, MULTI, SYSTEM], ids=["single", "multi", "system"])
def test_ids_equal_the_templates_own(chat, name, messages):  # C4
    if name == "gemma" and messages is SYSTEM:
        pytest.skip("this template has no system role")
    tokenizer = chat(name)
    ids = render_chat(messages, tokenizer).ids.tolist()
    expected = template_ids(tokenizer, messages)
    if name == "no_terminator":  # the one stated exception: EOS after the last turn
        expected = [*expected, tokenizer.eos_id]
    assert ids == expected
    assert ids.count(tokenizer.bos_id) <= 1
    prompt = render_prompt(messages[:-1], tokenizer)
    assert prompt == template_ids(tokenizer, messages[:-1], add_generation_prompt=True)


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_mask_is_content_and_one_terminator(chat, name):  # C5, C7, C8, C9
    tokenizer = chat(name)
    single, multi = GOLDEN[name]
    assert trained(tokenizer, render_chat(SINGLE, tokenizer)) == single
    # A run ends where another turn begins, or with a terminator that a newline follows.
    assert trained(tokenizer, render_chat(MULTI, tokenizer)) == multi


@pytest.mark.parametrize("name", [n for n in TEMPLATES if n != "gemma"])
def test_system_and_user_words_are_never_trained(chat, name):  # C9
    tokenizer = chat(name)
    text = trained(tokenizer, render_chat(SYSTEM, tokenizer))
    assert "cat" not in text and "Again" not in text and "Hello" not in text
    assert text.count("Meow meow") == 1 and text.count("Meow") == 2


def test_the_mask_begins_where_generation_does(chat):
    for name in ("chatml", "llama3", "gemma", "phi3", "no_terminator"):
        rendered = render_chat(SINGLE, chat(name))
        prompt = render_prompt(SINGLE[:-1], chat(name))
        assert rendered.ids[: len(prompt)].tolist() == prompt
        assert np.flatnonzero(rendered.mask)[0] == len(prompt)


def test_tool_calls_and_answers(chat):  # C9
    call = {"type": "function", "function": {"name": "moon", "arguments": {"phase": "full"}}}
    messages = [
        *talk((U, "Look")),
        {"role": A, "content": None, "tool_calls": [call]},
        *talk((T, "bright"), (A, "It is bright.")),
    ]
    for name in ("thinking",):
        rendered = render_chat(messages, chat(name))
        assert rendered.ids.tolist() == template_ids(chat(name), messages)
        calls, answer = trained(chat(name), rendered).split("|<think>")
        assert calls.strip().startswith("<tool_call>") and '"moon"' in calls
        assert calls.endswith("</tool_call><|im_end|>")
        assert answer == "\n\n</think>\n\nIt is bright.<|im_end|>"


def test_tools_reach_the_template(tokenizer):
    template = "{{ tools | tojson if tools else 'none' }}" + TEMPLATES["chatml"]
    with_tools = tokenizer.with_template(template)
    tools = [{"type": "function", "function": {"name": "moon"}}]
    rendered = render_chat(SINGLE, with_tools, tools)
    assert rendered.ids.tolist() == template_ids(with_tools, SINGLE, tools)
    assert "moon" in with_tools.decode(rendered.ids)
    assert with_tools.decode(render_chat(SINGLE, with_tools).ids).startswith("none")


def test_reasoning_dropped_from_earlier_turns_is_not_looked_for(tokenizer):
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == "
        "'assistant' and not loop.last %}{{ m['content'].split('</think>')[-1] | trim }}{% else %}"
        "{{ m['content'] }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt "
        "%}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    reasons = tokenizer.with_template(template)
    messages = talk((U, "a"), (A, "<think>so</think>\n\nOne"), (U, "b"), (A, "<think>s</think>Two"))
    text = trained(reasons, render_chat(messages, reasons))
    assert text == "One<|im_end|>|<think>s</think>Two<|im_end|>"


def test_repeated_words_are_not_confused(chat):  # C9
    messages = talk((U, "Paris."), (A, "Paris."), (U, "Paris."), (A, "Paris."))
    for name in TEMPLATES:
        rendered = render_chat(messages, chat(name))
        text = chat(name).decode(rendered.ids)
        assert text.count("Paris.") == 4
        assert trained(chat(name), rendered).count("Paris.") == 2
        first = np.flatnonzero(rendered.mask)[0]
        assert chat(name).decode(rendered.ids[:first]).count("Paris.") == 1


def test_a_template_that_drops_earlier_answers_is_refused(tokenizer):
    drops = tokenizer.with_template(
        "{% for m in messages %}{% if m['role'] == 'user' or loop.last %}{{ m['content'] + '\n' }}"
        "{% endif %}{% endfor %}"
    )
    with pytest.raises(RequestError, match=r"messages\[1\].*data.template"):
        render_chat(MULTI, drops)


def test_a_template_that_refuses_says_so_in_its_own_words(chat):
    with pytest.raises(RequestError, match="System role not supported"):
        render_chat(SYSTEM, chat("gemma"))


def test_no_template_is_an_error(tokenizer):
    with pytest.raises(RequestError, match="no chat template"):
        render_chat(SINGLE, tokenizer)


def test_roles_name_each_message(chat):
    rendered = render_chat(SYSTEM, chat("llama3"))
    tokenizer = chat("llama3")
    words = {
        name: tokenizer.decode(rendered.ids[rendered.roles == code])
        for code, name in enumerate(ROLE_NAMES)
    }
    assert "You are a cat." in words["system"]
    assert "Hello" in words["user"] and "Again" in words["user"]
    assert words["assistant"] == "Meow<|eot_id|>Meow meow<|eot_id|>"
    assert "<|start_header_id|>" in words["template"]


def test_completion_is_tokenised_once_and_closed_once(tokenizer):  # C5, C22
    rendered = render_completion("What is the capital?", " Paris.", tokenizer)
    whole = tokenizer.encode("What is the capital? Paris.")
    assert rendered.ids.tolist() == [*whole, tokenizer.eos_id]
    assert rendered.ids[0] == tokenizer.bos_id
    assert trained(tokenizer, rendered) == " Paris.</s>"
    again = render_completion("What is the capital?", " Paris.</s>", tokenizer)
    assert again.ids.tolist() == rendered.ids.tolist()  # already closed: not closed twice
    assert again.mask.tolist() == rendered.mask.tolist()


def test_a_token_across_the_boundary_is_trained(tokenizer):  # C22
    rendered = render_completion("the mo", "on. Paris", tokenizer)
    assert rendered.ids.tolist() == [*tokenizer.encode("the moon. Paris"), tokenizer.eos_id]
    assert trained(tokenizer, rendered).replace("</s>", "").endswith("on. Paris")


def test_characters_of_several_tokens(tokenizer, chat):
    rendered = render_completion("né ", "日本😀", tokenizer)
    assert trained(tokenizer, rendered).strip() == "日本😀</s>"
    rendered = render_chat(talk((U, "😀"), (A, "é😀日")), chat("chatml"))
    assert trained(chat("chatml"), rendered) == "é😀日<|im_end|>"


def test_text_is_all_trained_but_its_first_token(tokenizer, tmp_path):
    rendered = render_text("Once upon a time", tokenizer)
    assert rendered.ids.tolist() == [*tokenizer.encode("Once upon a time"), tokenizer.eos_id]
    assert rendered.mask.tolist() == [0.0] + [1.0] * (len(rendered.ids) - 1)
    bare = load_tokenizer(write_tokenizer(tmp_path / "bare", add_bos=False))
    rendered = render_text("Once upon a time", bare)
    assert rendered.ids[0] != bare.bos_id and rendered.mask[0] == 0.0


@settings(max_examples=40, deadline=None)
@given(
    turns=st.lists(
        st.tuples(
            st.text("ab cé?\n", max_size=6), st.text("xy zß.\n", min_size=1, max_size=6)
        ).filter(lambda t: t[1].strip()),
        min_size=1,
        max_size=3,
    ),
    name=st.sampled_from(sorted(TEMPLATES)),
)
def test_masks_do_not_depend_on_the_padding_id(both_pads, turns, name):  # C6
    messages = [m for u, a in turns for m in talk((U, u), (A, a))]
    plain, padded = (render_chat(messages, t.with_template(TEMPLATES[name])) for t in both_pads)
    np.testing.assert_array_equal(plain.ids, padded.ids)
    np.testing.assert_array_equal(plain.mask, padded.mask)
    assert plain.mask[1:].any() and plain.mask[0] == 0
    if name not in ("phi3", "no_terminator", "eos_at_end"):
        ends = np.flatnonzero(np.diff(np.append(plain.mask, 0)) == -1)
        terminator = both_pads[0].with_template(TEMPLATES[name]).endings.last.strip()
        ids = both_pads[0].encode(terminator, special=False)
        assert plain.ids[ends].tolist() == ids * len(turns)


@pytest.fixture(scope="module")
def both_pads(tmp_path_factory):
    """Tokenizers that differ in one thing: in the second, padding is the EOS."""
    root = tmp_path_factory.mktemp("pads")
    return [load_tokenizer(write_tokenizer(root / str(p), pad=p)) for p in (None, "</s>")]


@functools.cache
def published(path: Path):
    """A real tokenizer.json, to which the templates' special tokens are unknown words."""
    with tempfile.TemporaryDirectory() as directory:
        content = gzip.decompress((path / "tokenizer.json.gz").read_bytes())
        (Path(directory) / "tokenizer.json").write_bytes(content)
        config = {"tokenizer_class": "PreTrainedTokenizerFast"}
        config |= {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
        (Path(directory) / "tokenizer_config.json").write_text(json.dumps(config))
        return load_tokenizer(directory)


@pytest.fixture(params=["minimind", "gpt_neox_pythia"])
def real(request, shared):
    return published(shared / "data" / "tokenizers" / request.param)


REAL_TEMPLATES = [
    "alpaca",
    "amberchat",
    "chatml",
    "chatqa",
    "falcon-instruct",
    "gemma-it",
    "granite-3.0-instruct",
    "llama-2-chat",
    "llama-3-instruct",
    "mistral-instruct",
    "openchat-3.5",
    "phi-3",
    "phi-3-small",
    "qwen2.5-instruct",
    "qwen3",
    "saiga",
    "solar-instruct",
    "vicuna",
    "zephyr",
]
OPEN_ENDED = {"amberchat", "chatqa", "falcon-instruct", "solar-instruct"}


@pytest.mark.parametrize("name", REAL_TEMPLATES)
def test_published_templates(real, shared, name):  # C4, C5, C7, C8
    folder = shared / "data" / "tokenizers" / "chat_templates"
    if name == "qwen3":
        config = json.loads((folder / "qwen3_tokenizer_config.json").read_text())
        template = config["chat_template"]
    else:
        # Published with line breaks for reading; a template's own text has none between tags.
        text = (folder / f"{name}.jinja").read_text()
        template = text if "{%-" in text else text.replace("    ", "").replace("\n", "")
    tokenizer = real.with_template(read_template(template))
    for messages in (SINGLE, MULTI):
        rendered = render_chat(messages, tokenizer)
        expected = template_ids(tokenizer, messages)
        if name in OPEN_ENDED:
            expected = [*expected, tokenizer.eos_id]
        assert rendered.ids.tolist() == expected
        text = trained(tokenizer, rendered)
        for message in messages:
            assert (message["content"] in text) == (message["role"] == A)
        assert "INST" not in text and "user" not in text.lower()
        if name not in OPEN_ENDED:
            assert text.rstrip() == text and text.endswith(tokenizer.endings.last.strip())


@pytest.mark.parametrize("name", ["qwen3", "minimind"])
def test_published_templates_with_tools(real, shared, name):  # C4, C9
    folder = shared / "data" / "tokenizers"
    files = {"qwen3": "chat_templates/qwen3_tokenizer_config.json"}
    path = folder / files.get(name, "minimind/tokenizer_config.json")
    tokenizer = real.with_template(json.loads(path.read_text())["chat_template"])
    call = {"type": "function", "function": {"name": "moon", "arguments": {"day": 3}}}
    messages = [
        *talk((S, "You are a cat."), (U, "Hello"), (A, "Meow."), (U, "Look at it")),
        {"role": A, "content": "", "tool_calls": [call]},
        *talk((T, "bright"), (A, "It shines."), (U, "And now?")),
        {"role": A, "content": "Wait.", "tool_calls": [call, call]},
        *talk((T, "dark"), (T, "dark"), (A, "It is gone.")),
    ]
    tools = [{"type": "function", "function": {"name": "moon", "parameters": {"type": "object"}}}]
    rendered = render_chat(messages, tokenizer, tools)
    assert rendered.ids.tolist() == template_ids(tokenizer, messages, tools)
    turns = re.split(r"(?<=<\|im_end\|>)\|", trained(tokenizer, rendered))
    assert len(turns) == 5 and all(turn.count("<|im_end|>") == 1 for turn in turns)
    contents = [re.sub(r"<think>\s*</think>\s*", "", turn) for turn in turns]
    starts = ("Meow.", "", "It shines.", "Wait.", "It is gone.")
    assert all(c.startswith(w) for c, w in zip(contents, starts, strict=True))
    assert [turn.count('{"name": "moon"') for turn in turns] == [0, 1, 0, 2, 0]
    assert not any(word in "".join(turns) for word in ("bright", "dark", "cat", "now"))
    assert all(turn.endswith("<|im_end|>") for turn in turns)
