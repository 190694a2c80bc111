"""Tokenizers: facts that rendering needs, and directories that are not there or not right."""

from __future__ import annotations

import json
import shutil

import pytest

from jaxtune.core.errors import RequestError
from jaxtune.data.tokenizer import load_tokenizer

from .conftest import TEMPLATES, write_tokenizer


def test_facts(tokenizer, tokenizer_dir, tmp_path):
    ids = tokenizer.hf.convert_tokens_to_ids
    assert tokenizer.bos_id == ids("<s>") and tokenizer.eos_id == ids("</s>")
    assert tokenizer.eos_ids == (ids("</s>"),)
    assert tokenizer.adds_bos and tokenizer.chat_template is None
    assert tokenizer.encode("hi") == [tokenizer.bos_id, *tokenizer.encode("hi", special=False)]
    assert tokenizer.decode(tokenizer.encode("hi é日")) == "<s>hi é日"
    assert tokenizer.decode(tokenizer.encode("hi é日"), skip_special=True) == "hi é日"
    assert max(tokenizer.encode("".join(map(chr, range(300))))) < tokenizer.vocab_size
    bare = load_tokenizer(write_tokenizer(tmp_path / "bare", add_bos=False))
    assert not bare.adds_bos
    (ids_of,), (offsets,) = tokenizer.encode_with_offsets(["ab é"])
    assert ids_of == tokenizer.encode("ab é") and offsets[0] == (0, 0) and offsets[-1][1] == 4


def test_generation_stops_at_config_ids_and_turn_ends(tokenizer_dir, tmp_path, chat):
    folder = shutil.copytree(tokenizer_dir, tmp_path / "model")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7]}))
    (folder / "config.json").write_text(json.dumps({"eos_token_id": 9, "model_type": "llama"}))
    assert load_tokenizer(folder).eos_ids == (2, 7, 9)
    for name, end in (("chatml", "<|im_end|>"), ("llama3", "<|eot_id|>"), ("phi3", "<|end|>")):
        stop = chat(name).hf.convert_tokens_to_ids(end)
        assert chat(name).eos_ids == (chat(name).eos_id, stop)
    assert chat("mistral").eos_ids == (chat("mistral").eos_id,)


def test_saving_keeps_ids_and_template(chat, tmp_path):
    one = chat("llama3")
    one.save(tmp_path / "saved")
    two = load_tokenizer(tmp_path / "saved")
    assert two.chat_template == one.chat_template
    assert two.encode("Hello there") == one.encode("Hello there")
    assert two.fingerprint() == one.fingerprint()


def test_the_fingerprint_sees_template_and_vocabulary(chat, tokenizer, tokenizer_dir, tmp_path):
    prints = {chat(name).fingerprint() for name in TEMPLATES} | {tokenizer.fingerprint()}
    assert len(prints) == len(TEMPLATES) + 1
    assert load_tokenizer(tokenizer_dir).fingerprint() == tokenizer.fingerprint()
    tokenizer.hf(["a", "b c"], padding=False, truncation=True, max_length=4)  # leaves traces
    assert load_tokenizer(tokenizer_dir).fingerprint() == tokenizer.fingerprint()
    other = write_tokenizer(tmp_path / "other", add_bos=False)
    assert load_tokenizer(other).fingerprint() != tokenizer.fingerprint()


def test_a_template_is_text_or_a_file(tokenizer, tmp_path):
    path = tmp_path / "chatml.jinja"
    path.write_text(TEMPLATES["chatml"])
    assert tokenizer.with_template(path).chat_template == TEMPLATES["chatml"]
    assert tokenizer.with_template(TEMPLATES["gemma"]).chat_template == TEMPLATES["gemma"]
    assert tokenizer.chat_template is None  # the original is left alone
    tagged = "{% generation %}{{ messages[0]['content'] }}{% endgeneration %}"
    assert tokenizer.with_template(tagged).chat_template == tagged
    with pytest.raises(RequestError, match="no such chat template file") as error:
        tokenizer.with_template(tmp_path / "none.jinja")
    assert error.value.key == "data.template"
    with pytest.raises(RequestError, match="not valid Jinja"):
        tokenizer.with_template("{% for m in messages %}{{ m }}")
    path.write_bytes(b"{{ \xff }}")
    with pytest.raises(RequestError, match="not UTF-8"):
        tokenizer.with_template(path)


def test_bad_directories(tokenizer_dir, tmp_path):
    def broken(name: str, **files: str):
        folder = shutil.copytree(tokenizer_dir, tmp_path / name)
        for file, content in files.items():
            (folder / f"{file}.json").write_text(content)
        return folder

    (tmp_path / "empty").mkdir()
    for folder, message in (
        (tmp_path / "nowhere", "no such tokenizer directory"),
        (tmp_path / "empty", "no tokenizer.json"),
        (broken("a", tokenizer="{"), "not valid JSON"),
        (broken("b", tokenizer='{"model": 3}'), "cannot load the tokenizer"),
        (broken("c", tokenizer="[]"), "not a JSON object"),
        (broken("d", tokenizer_config="{,"), "not valid JSON"),
        (broken("e", generation_config="x"), "not valid JSON"),
    ):
        with pytest.raises(RequestError, match=message) as error:
            load_tokenizer(folder)
        assert str(folder) in error.value.where and "\n" not in str(error.value)


def test_a_tokenizer_json_is_enough(tokenizer_dir, tmp_path, tokenizer):
    (tmp_path / "only").mkdir()
    shutil.copy(tokenizer_dir / "tokenizer.json", tmp_path / "only")
    bare = load_tokenizer(tmp_path / "only")
    assert bare.encode("hello") == tokenizer.encode("hello")


def test_the_two_real_models(shared):
    for name, size in (("stories260k", 512), ("babyllama105", 105)):
        tokenizer = load_tokenizer(shared / "models" / name)
        assert tokenizer.vocab_size == size
        assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.adds_bos) == (1, (2,), True)
        golden = json.loads((shared / "models" / name / "golden.json").read_text())
        assert golden
