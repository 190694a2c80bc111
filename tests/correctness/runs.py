"""Configs of tiny whole runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import ml_collections

from jaxtune.parallel.mesh import make_mesh
from jaxtune.recipes.base import from_preset
from tests.correctness.small import CONFIG, examples

SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads")
SIZES += ("num_kv_heads", "head_dim", "max_position_embeddings")
OVERRIDES = {name: getattr(CONFIG, name) for name in SIZES} | {"tie_embeddings": False}
PEFT: dict[str, dict[str, Any]] = {
    "full": {"method": "full"},
    "partial": {"method": "full", "train": ["blocks/attn/.*", "final_norm/scale"]},
    "lora": {"method": "lora", "rank": 3, "dropout": 0.25},
    "rslora": {"method": "lora", "rank": 3, "variant": "rslora"},
    "dora": {"method": "lora", "rank": 3, "variant": "dora"},
    "pissa": {"method": "lora", "rank": 3, "variant": "pissa"},
    "houlsby": {"method": "adapter", "bottleneck": 4, "placement": "houlsby"},
    "pfeiffer": {"method": "adapter", "bottleneck": 4, "placement": "pfeiffer"},
    "parallel": {"method": "adapter", "bottleneck": 4, "placement": "parallel"},
    "prompt": {"method": "prompt", "num_tokens": 3},
    "prefix": {"method": "prefix", "num_tokens": 3},
    "ia3": {"method": "ia3"},
    "bitfit": {"method": "bitfit"},
}


def write_examples(path: Path, lengths=(5, 19, 2, 11, 7, 13, 9, 6), seed: int = 0) -> str:
    """Writes token examples and returns their source."""
    rows = [
        {"input_ids": ids.tolist(), "loss_mask": [int(m) for m in mask]}
        for ids, mask in examples(lengths, seed)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"jsonl:{path}"


def run_config(directory: Path, peft: str | dict[str, Any] = "lora", **sections: Any):
    """The config of a run of four steps; a keyword replaces a key, or keys of a section."""
    train, held = directory / "train.jsonl", directory / "eval.jsonl"
    config: dict[str, Any] = {
        "seed": 0,
        "model": {"preset": "tiny-1m", "dtype": "float32", "overrides": OVERRIDES},
        "peft": PEFT[peft] if isinstance(peft, str) else peft,
        "data": {
            "train": [{"source": write_examples(train), "format": "tokens"}],
            "eval": [
                {"source": write_examples(held, (8, 4, 12), 1), "format": "tokens", "name": "held"}
            ],
            "seq_len": 24,
        },
        "batch_size": 4,
        "total_steps": 4,
        "optim": {"name": "adamw", "lr": 1e-2, "weight_decay": 0.1},
        "mesh": {"data": 1, "fsdp": 1},
        "checkpoint": {"async_save": False},
        "log": {"every_steps": 1, "tensorboard": False},
    }
    for name, value in sections.items():
        config[name] = config[name] | value if isinstance(value, dict) else value
    return ml_collections.ConfigDict(config)


def base_params(dtype: str = "float32", overrides: dict[str, Any] | None = None, seed: int = 0):
    """The random base weights that such a run begins with."""
    preset = {"preset": "tiny-1m", "tokenizer": None, "overrides": overrides or OVERRIDES}
    base = from_preset(ml_collections.ConfigDict(preset), seed)
    return base.config, base.load(lambda path: dtype, make_mesh({}, jax.devices()[:1]))
