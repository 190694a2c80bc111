"""A tiny policy that writes letters, prompts for it and rewards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.correctness.tiny_runs import MODEL

LETTERS = "abcdefghijklmnopqrstuvwxyz "
EOS = "</s>"
SEQ, NEW = 16, 8


def write_tokenizer(directory: Path) -> Path:
    """Writes a tokenizer of one id a letter, `</s>` and `<s>`, which it puts first."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocab = {token: i for i, token in enumerate(["<unk>", "<s>", EOS, *LETTERS])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    hf = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token=EOS, unk_token="<unk>"
    )
    hf.save_pretrained(directory)
    return directory


def write_prompts(path: Path, prompts: list[dict[str, Any]]) -> str:
    """Writes prompt records; returns the source."""
    path.write_text("".join(json.dumps(record) + "\n" for record in prompts))
    return f"jsonl:{path}"


def replaying(directory: Path, **more: Any) -> dict[str, Any]:
    """The section `retention` that replays texts, which are written."""
    path, words = directory / "old.jsonl", ("abcab", "hello world", "to be or", "not to be")
    path.write_text("".join(json.dumps({"text": word}) + "\n" for word in words))
    return {"replay_data": [{"source": f"jsonl:{path}", "format": "text"}], "replay": 0.5} | more


def letters(prompts: list[str], completions: list[str]) -> list[float]:
    """The share of the letter that a prompt ends with."""
    return [
        sum(c == prompt[-1] for c in text) / NEW
        for prompt, text in zip(prompts, completions, strict=True)
    ]


def run_config(directory: Path, name: str = "grpo", **changes: Any) -> dict[str, Any]:
    """A config of twelve steps of two passes over iterations of 4 × 4 rows.

    Args:
        directory: where tokenizer and prompts are written, once.
        name: of the objective.
        changes: dotted keys with `__` for the dot, set at the end; None removes one.
    """
    if not (directory / "train.jsonl").exists():
        write_tokenizer(directory / "tokenizer")
        words = ["a", "ab", "cab", "b", "ba", "abc", "bb"]
        write_prompts(directory / "train.jsonl", [{"prompt": word} for word in words])
        write_prompts(directory / "held.jsonl", [{"prompt": w} for w in ("ca", "cb", "c")])
    config: dict[str, Any] = {
        "seed": 5,
        "model": {
            "preset": "tiny-1m",
            "tokenizer": str(directory / "tokenizer"),
            "dtype": "float32",
            "overrides": {**MODEL, "vocab_size": 32},
        },
        "peft": {"method": "lora", "rank": 4},
        "objective": {
            "name": name,
            "rewards": [{"function": "tests.rl.tiny:letters"}],
            "prompts": 4,
            "samples": 4,
            "max_new_tokens": NEW,
            "epochs": 2,
        },
        "data": {
            "train": [{"source": f"jsonl:{directory}/train.jsonl", "format": "prompt"}],
            "eval": [{"source": f"jsonl:{directory}/held.jsonl", "format": "prompt"}],
            "seq_len": SEQ,
        },
        "batch_size": 8,
        "grad_accum": 2,
        "total_steps": 12,
        "optim": {"lr": 1e-2, "weight_decay": 0.01},
        "mesh": {"data": 1, "fsdp": 1},
        "checkpoint": {"every_steps": 3},
        "eval": {"every_steps": 6},
        "log": {"every_steps": 1, "tensorboard": False},
    }
    for key, value in changes.items():
        *sections, last = key.split("__")
        node = config
        for section in sections:
            node = node.setdefault(section, {})
        if value is None:
            node.pop(last, None)
        else:
            node[last] = value
    return config
