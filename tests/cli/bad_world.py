"""A small world that works (model, tokenizer, data, adapter, stopped run), to be damaged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.goldens.tiny import write_adapter, write_llama

WORDS = [
    "the", "cat", "sat", "on", "a", "mat", "and", "looked", "at", "moon", "what", "is", "it",
    "user", "assistant", "hello", "you", "are",
]  # fmt: skip
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system role') }}"
    "{% endif %}{{ '<s> ' + m['role'] + ' ' + m['content'] + ' </s> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s> assistant ' }}{% endif %}"
)


def write_tokenizer(directory: Path, words: list[str] = WORDS) -> None:
    """Writes a tokenizer of whole words, with a chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>", *words])}
    plain = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=plain, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    fast.chat_template = TEMPLATE
    fast.save_pretrained(directory)


def write_lines(path: Path, records: list[Any]) -> None:
    """Writes JSON lines."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def chat(text: str = "hello you") -> dict[str, Any]:
    """A conversation of two turns."""
    turns = [{"role": "user", "content": text}, {"role": "assistant", "content": "the cat sat"}]
    return {"messages": turns}


def config() -> dict[str, Any]:
    """A config of four steps with paths relative to the world."""
    return {
        "model": {"path": "model", "dtype": "float32"},
        "peft": {"method": "lora", "rank": 4},
        "data": {
            "train": [{"source": "jsonl:train.jsonl", "format": "chat"}],
            "eval": [{"source": "jsonl:held.jsonl", "format": "chat"}],
            "seq_len": 16,
        },
        "batch_size": 4,
        "total_steps": 4,
        "optim": {"lr": 1e-2},
        "mesh": {"data": 1, "fsdp": 1},
        "checkpoint": {"every_steps": 1, "keep": 3},
        "log": {"every_steps": 1, "tensorboard": False},
    }


def write_world(directory: Path) -> None:
    """Writes everything but the run."""
    write_llama(directory / "model")
    write_tokenizer(directory / "model")
    write_adapter(directory / "adapter", "lora", directory / "model")
    write_adapter(directory / "prefix", "prefix", directory / "model")
    write_lines(directory / "train.jsonl", [chat(word) for word in WORDS])
    write_lines(directory / "held.jsonl", [chat("on a mat"), chat("moon")])
    write_lines(directory / "ids.jsonl", [{"input_ids": [4, 5, 6, 7]}] * 5)
    (directory / "config.json").write_text(json.dumps(config()))
