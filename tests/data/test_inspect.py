"""`data inspect`: the text is whole, and what is trained can be seen with and without colour."""

from __future__ import annotations

import io
import re

import numpy as np
from rich.console import Console

from jaxtune.data.inspect import inspect, token_text
from jaxtune.data.prompts import Prompts, read_prompts
from jaxtune.data.sources import Source
from jaxtune.data.store import tokenize
from jaxtune.data.stream import Stream

RECORDS = [{"instruction": f"Name {i} é😀", "output": f"It is\n{i}."} for i in range(6)]


def store(tokenizer):
    source = Source("memory", len(RECORDS), RECORDS.__getitem__, lambda i: f"memory:{i + 1}")
    return tokenize(source, "instruction", tokenizer, seq_len=64, keep_roles=True)


def printed(data, tokenizer, colour: bool, **kwargs) -> str:
    out = io.StringIO()
    console = Console(
        file=out, width=200, force_terminal=colour, color_system="truecolor" if colour else None
    )
    inspect(data, tokenizer, console=console, **kwargs)
    return out.getvalue()


def test_trained_tokens_stand_in_brackets_without_colour(chat):
    data = store(chat("chatml"))
    text = printed(data, chat("chatml"), False, n=2)
    assert "⟦It is↵\n0.<|im_end|>⟧" in text and "⟦It is↵\n1.<|im_end|>⟧" in text
    assert "It is↵\n2." not in text
    assert "memory:1" in text and "memory:2" in text
    assert "assistant" in text and "user" in text and "\x1b[" not in text
    assert "trained_tokens" in text and str(data.counts.trained_tokens) in text


def test_colours_hold_the_same_text(chat):
    text = printed(store(chat("llama3")), chat("llama3"), True, n=1, start=3)
    assert "\x1b[" in text and "⟦" not in text and "memory:" in text
    assert len(re.findall(r"\x1b\[1;(4;)?30;42m", text)) > 3  # black on green


def test_packed_rows_show_their_segments(chat):
    stream = Stream([store(chat("chatml"))], seq_len=64, packing=True, shuffle=False)
    text = printed(stream, chat("chatml"), False, n=1)
    assert "row 0" in text and "segment 1" in text and "segment 2" in text
    assert "% full" in text and "6 examples" in text


def test_every_character_is_shown(chat, tokenizer):
    data = store(chat("chatml"))
    for i in range(len(data)):
        ids, mask = data.example(i)
        shown = token_text(ids, mask, data.example_roles(i), chat("chatml")).plain
        expected = chat("chatml").decode(ids).replace("\n", "↵\n")
        assert shown.replace("·", "") == expected
    assert token_text(ids, mask, None, None).plain.split() == [str(i) for i in ids]


def source_of(records) -> Source:
    return Source("memory", len(records), records.__getitem__, lambda i: f"memory:{i + 1}")


PAIR = {"prompt": "The cat", "chosen": " sat on the mat", "rejected": " looked", "margin": 0.5}


def test_completions_of_a_prompt_are_named(tokenizer):
    records = [PAIR, PAIR | {"weight": 3, "margin": 0}]

    def made(**options):
        return tokenize(source_of(records), "preference", tokenizer, seq_len=64, **options)

    store = made()
    text = printed(store, tokenizer, False, n=2)
    size, trained = store.lengths[0], np.count_nonzero(store.example(0)[1])
    assert f"segments 1-2: memory:1, {size} tokens, {trained} trained, margin 0.5\n" in text
    assert "chosen:\n⟦ sat on the mat</s>⟧\nrejected:\n⟦ looked</s>⟧\n" in text
    assert text.count("<s>The cat\n") == 2 and "weight 3" in text
    packed = Stream([made(shared=True)], seq_len=64, packing=True, shuffle=False)
    text = printed(packed, tokenizer, False, n=1)
    assert "segment 1: memory:1" in text and "segment 2: memory:2" in text
    text = printed(made(keep_roles=True), tokenizer, True, n=1)
    assert "30;42m" in text and "30;41m" in text and "not wanted" in text


def test_judgements_are_told(tokenizer):
    record = {"prompt": "The cat", "completion": " sat", "label": False}
    text = printed(
        tokenize(source_of([record]), "unpaired", tokenizer, seq_len=64), tokenizer, True
    )
    assert "30;41m" in text
    record = {"prompt": "The cat", "completions": [" sat.", " looked."], "labels": [1, 0.5]}
    text = printed(
        tokenize(source_of([record]), "stepwise", tokenizer, seq_len=64), tokenizer, False
    )
    assert "2 trained, label 1 0.5" in text
    record = {"prompt": "The cat", "completions": [" sat.", " looked.", " a dog."]}
    text = printed(tokenize(source_of([record]), "ranked", tokenizer, seq_len=64), tokenizer, False)
    assert "segments 1-3" in text and "completion 1, the best:" in text and "completion 3:" in text


def test_prompts_are_shown_with_their_columns(tokenizer):
    records = [{"prompt": f"The cat {i}", "answer": [i]} for i in range(3)]
    prompts = Prompts((read_prompts(source_of(records), tokenizer, max_prompt=9),), shuffle=False)
    text = printed(prompts, tokenizer, False, n=2, start=1)
    assert "memory:2" in text and "The cat 2" in text and "answer: [1]" in text
    assert "The cat 0" not in text and "tokens_kept" in text
