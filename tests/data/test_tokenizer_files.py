"""Tokenizers without tokenizer.json: ids are those of the library that made the file."""

from __future__ import annotations

import base64
import json
import shutil
from pathlib import Path

import pytest

from jaxtune.core.errors import RequestError
from jaxtune.data.chat import render_chat
from jaxtune.data.tokenizer import load_tokenizer
from tests.goldens import tokenizers as goldens

from .conftest import TEMPLATES

GOLDEN = json.loads(goldens.FILE.read_text())
OWN = {name: base64.b64decode(value["model"]) for name, value in GOLDEN["own"].items()}


def write(directory: Path, model: str | bytes, name: str = "tokenizer.model", **config) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / name).write_bytes(OWN[model] if isinstance(model, str) else model)
    if config:
        (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


@pytest.mark.parametrize("name", OWN)
def test_ids_are_the_librarys(name, tmp_path):
    tokenizer = load_tokenizer(write(tmp_path, name))
    for text, ids in zip(GOLDEN["texts"], GOLDEN["own"][name]["ids"], strict=True):
        assert tokenizer.encode(text, special=False) == ids, text
        if name != "unigram.model" and "▁" not in text:  # these two keep every byte
            assert tokenizer.decode(ids) == text
    # What is trained is cut out by offsets: they must cover the text.
    (ids,), (offsets,) = tokenizer.encode_with_offsets(["né café 日本 x"])
    assert (offsets[0] == (0, 0)) == tokenizer.adds_bos and offsets[-1][1] == len("né café 日本 x")


@pytest.mark.parametrize("name", [*goldens.SENTENCEPIECE, *goldens.TIKTOKEN, goldens.GPT2])
def test_real_files(name, shared, tmp_path):
    source = shared / "data" / "tokenizers" / name
    if name == goldens.GPT2:
        shutil.copytree(source, tmp_path, dirs_exist_ok=True)
    else:
        names = goldens.SENTENCEPIECE | goldens.TIKTOKEN
        shutil.copy(source, tmp_path / names[name])
    tokenizer = load_tokenizer(tmp_path)
    texts = goldens.real_texts(shared / "data")
    ids = tokenizer.hf(texts, add_special_tokens=False, verbose=False)["input_ids"]
    assert goldens.digest(ids) == GOLDEN["real"][name]
    if "mistral" in name or name in (*goldens.TIKTOKEN, goldens.GPT2):
        pairs = [(tokenizer.decode(i), t) for i, t in zip(ids, texts, strict=True) if "▁" not in t]
        assert all(back == text for back, text in pairs)


def test_ends_of_texts_are_the_files_until_the_config_says(tmp_path):
    plain = load_tokenizer(write(tmp_path / "a", "bpe.model"))
    assert (plain.bos_id, plain.eos_id, plain.adds_bos) == (1, 2, True)
    meta = load_tokenizer(write(tmp_path / "b", "tiktoken.model"))
    assert meta.decode([meta.bos_id, meta.eos_id]) == "<|begin_of_text|><|end_of_text|>"
    assert meta.encode("<|eot_id|>a", special=False)[0] == 300 + 9 and meta.vocab_size == 556
    other = load_tokenizer(
        write(tmp_path / "c", "bpe.model", add_bos_token=False, add_eos_token=True)
    )
    assert other.encode("hi") == [*plain.encode("hi", special=False), 2]


def test_the_config_beside_a_model_holds(tmp_path):
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": {"content": "<s>", "special": True},
        "pad_token": "<pad>",
        "chat_template": TEMPLATES["chatml"],
        "added_tokens_decoder": {
            "1": {"content": "<s>", "special": True},
            "400": {"content": "<|im_start|>", "special": True},
            "402": {"content": "<|im_end|>", "special": True},
        },
    }
    tokenizer = load_tokenizer(write(tmp_path / "a", "bpe.model", **config))
    messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
    ids = render_chat(messages, tokenizer).ids.tolist()
    assert ids == tokenizer.hf.apply_chat_template(messages, tokenize=True, return_dict=False)
    assert ids[0] == 400 and 402 in ids and 402 in tokenizer.eos_ids
    # No space between a special token and the text after it, unless the config asks for it.
    tokenizer_legacy = load_tokenizer(write(tmp_path / "b", "bpe.model", legacy=True, **config))
    after = [
        t.encode("<|im_start|>Hello", special=False)[1:] for t in (tokenizer, tokenizer_legacy)
    ]
    assert after[1] == tokenizer.encode("Hello", special=False) != after[0]
    tokenizer.save(tmp_path / "saved")
    again = load_tokenizer(tmp_path / "saved")
    assert again.fingerprint() == tokenizer.fingerprint()
    assert again.encode("  a b") == tokenizer.encode("  a b")
    wrong = dict(config, added_tokens_decoder={"5": {"content": "<|im_end|>"}})
    with pytest.raises(RequestError, match=r"'<\|im_end\|>' is .* says 5"):
        load_tokenizer(write(tmp_path / "c", "bpe.model", **wrong))


def test_which_file_counts(tokenizer_dir, tmp_path):
    folder = shutil.copytree(tokenizer_dir, tmp_path / "both")
    assert load_tokenizer(write(folder, "bpe.model")).vocab_size == 400  # tokenizer.json
    assert load_tokenizer(write(tmp_path / "odd", "bpe.model", "any.model.v3")).vocab_size < 400
    write(tmp_path / "odd", "unigram.model", "second.model")
    with pytest.raises(RequestError, match=r"any.model.v3, second.model"):
        load_tokenizer(tmp_path / "odd")


def test_damaged_files_are_named(tmp_path):
    lines = OWN["tiktoken.model"].splitlines()
    for name, model, message, place in (
        ("a", b"\x89PNG\r\n\x1a\n" * 9, "not a SentencePiece model", "tokenizer.model"),
        ("b", b"", "not a SentencePiece model", "tokenizer.model"),
        ("c", OWN["bpe.model"][:-100], "not a SentencePiece model", "tokenizer.model"),
        (
            "d",
            b"\n".join([*lines[:9], b"what is this", *lines[9:]]),
            "base64",
            "tokenizer.model:10",
        ),
        ("e", b"\n".join(lines[:-2] + lines[-1:]), "ranks are not 0..298", "tokenizer.model"),
        ("f", b"\n".join(lines[:200]), "no rank for the byte 0x", "tokenizer.model"),
    ):
        with pytest.raises(RequestError, match=message) as error:
            load_tokenizer(write(tmp_path / name, model))
        assert error.value.where == str(tmp_path / name / place)
    with pytest.raises(RequestError, match=r"how a text is split.*o200k_base"):
        load_tokenizer(write(tmp_path / "g", "tiktoken.model", "mine.tiktoken"))
    (tmp_path / "h").mkdir()
    with pytest.raises(RequestError, match=r"no tokenizer.json, tokenizer.model, \*.tiktoken"):
        load_tokenizer(tmp_path / "h")
