"""`data inspect`: the text is whole, and what is trained can be seen with and without colour."""

from __future__ import annotations

import io
import re

from rich.console import Console

from jaxtune.data.inspect import inspect, token_text
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
