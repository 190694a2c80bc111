"""What a reward model scores is what it was trained on."""

from __future__ import annotations

import numpy as np
import pytest

from jaxtune.core.errors import RequestError
from jaxtune.data.scored import scored_ids
from jaxtune.data.sources import Source
from jaxtune.data.store import tokenize
from jaxtune.data.template import render
from jaxtune.data.tokenizer import load_tokenizer
from tests.data.conftest import TEMPLATES, write_tokenizer

PROMPT = "What is the capital of France?"
SIDES = (" Paris.", " Hello there, little dog")


def trained_sides(record, tokenizer) -> list[list[int]]:
    """The sides of a training row, each up to the token at which its score is read."""
    source = Source("memory", 1, [record].__getitem__, lambda i: f"memory:{i + 1}")
    store = tokenize(source, "preference", tokenizer, seq_len=400)
    (ids, mask), branches = store.example(0), store.example_columns(0)["branches"]
    out = []
    for side in (1, 2):
        mine = np.flatnonzero((branches == 0) | (branches == side))
        last = np.flatnonzero((branches == side) & (mask > 0))[-1]
        out.append(ids[mine[mine <= last]].tolist())
    return out


@pytest.mark.parametrize("add_bos", [False, True])
def test_strings_are_scored_as_they_are_trained(tmp_path, add_bos):
    tokenizer = load_tokenizer(write_tokenizer(tmp_path, add_bos=add_bos))
    record = {"prompt": PROMPT, "chosen": SIDES[0], "rejected": SIDES[1]}
    wanted = trained_sides(record, tokenizer)
    assert scored_ids([PROMPT + side for side in SIDES], tokenizer) == wanted
    # One EOS, though the text has its own.
    assert scored_ids([f"{PROMPT}{side}</s>" for side in SIDES], tokenizer) == wanted
    assert all(ids.count(tokenizer.eos_id) == 1 == (ids[-1] == tokenizer.eos_id) for ids in wanted)


@pytest.mark.parametrize("name", TEMPLATES)
def test_conversations_are_scored_as_they_are_trained(tokenizer_dir, name):
    tokenizer = load_tokenizer(tokenizer_dir).with_template(TEMPLATES[name])
    prompt = [{"role": "user", "content": PROMPT}]
    sides = [[{"role": "assistant", "content": side.strip()}] for side in SIDES]
    record = {"prompt": prompt, "chosen": sides[0], "rejected": sides[1]}
    wanted = trained_sides(record, tokenizer)
    assert scored_ids([prompt + side for side in sides], tokenizer) == wanted
    written = [render(tokenizer.hf, prompt + side) for side in sides]
    terminator = tokenizer.endings.last.strip()
    # Else it might as well be a prompt and a completion without a template.
    if terminator not in ("", "</s>") or (terminator and written[0].startswith("<s>")):
        assert scored_ids(written, tokenizer) == wanted


def test_what_cannot_be_scored_is_named(tokenizer_dir):
    tokenizer = load_tokenizer(tokenizer_dir).with_template(TEMPLATES["chatml"])
    for texts, told in (
        (["fine", " "], "texts\\[1\\]"),
        ([[{"role": "user", "content": PROMPT}]], "texts\\[0\\] is not the assistant's"),
        ([[]], "empty"),
    ):
        with pytest.raises(RequestError, match=told) as error:
            scored_ids(texts, tokenizer)
        assert "\n" not in str(error.value)
