"""Configs of tiny whole runs on pairs, in words that are one token each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers

from tests.correctness.runs import OVERRIDES, PEFT

WORDS = 90
SEQ = 40


def write_tokenizer(directory: Path) -> str:
    """Writes a tokenizer of whole words, w0 to w89, with `<s>`, `</s>` and `<unk>`."""
    names = ["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(WORDS))]
    table = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, "<unk>"))
    table.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    directory.mkdir(parents=True, exist_ok=True)
    table.save(str(directory / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>"}
    settings |= {"eos_token": "</s>", "unk_token": "<unk>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return str(directory)


def words(rng: np.random.Generator, low: int, high: int) -> str:
    """Between low and high - 1 words."""
    return " ".join(f"w{i}" for i in rng.integers(0, WORDS, rng.integers(low, high)))


def write_pairs(path: Path, count: int, seed: int) -> str:
    """Writes pairs whose chosen side has even words and whose rejected side has odd ones."""
    rng = np.random.default_rng(seed)
    lines = []
    for _ in range(count):
        even, odd = (
            " ".join(f"w{2 * i + side}" for i in rng.integers(0, WORDS // 2, rng.integers(2, 8)))
            for side in (0, 1)
        )
        lines.append({"prompt": words(rng, 2, 6) + " ", "chosen": even, "rejected": odd})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return f"jsonl:{path}"


def pair_config(
    directory: Path,
    peft: str | dict[str, Any] = "lora",
    objective: dict[str, Any] | None = None,
    **sections: Any,
) -> dict[str, Any]:
    """The config of a run of four steps; a keyword replaces a key, or keys of a section."""
    if not (directory / "train.jsonl").exists():
        write_tokenizer(directory / "tokenizer")
        write_pairs(directory / "train.jsonl", 16, 0)
        write_pairs(directory / "held.jsonl", 5, 1)
    entries = {
        name: [{"source": f"jsonl:{directory}/{file}.jsonl", "format": "preference"}]
        for name, file in (("train", "train"), ("eval", "held"))
    }
    config: dict[str, Any] = {
        "seed": 0,
        "model": {
            "preset": "tiny-1m",
            "dtype": "float32",
            "overrides": OVERRIDES,
            "tokenizer": str(directory / "tokenizer"),
        },
        "peft": PEFT[peft] if isinstance(peft, str) else peft,
        "objective": objective or {"name": "dpo"},
        "data": {**entries, "seq_len": SEQ},
        "batch_size": 4,
        "total_steps": 4,
        "optim": {"name": "adamw", "lr": 1e-2, "weight_decay": 0.1},
        "eval": {"batch_size": 4},
        "mesh": {"data": 1, "fsdp": 1},
        "checkpoint": {"async_save": False},
        "log": {"every_steps": 1, "tensorboard": False},
    }
    for name, value in sections.items():
        config[name] = config[name] | value if isinstance(value, dict) else value
    return config
