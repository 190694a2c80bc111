"""Tiny whole runs, and what must be the same of two of them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from jaxtune.core.tree import flatten

VOCAB, SEQ = 97, 24
MODEL = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
TIMINGS = ("tokens_per_second", "step_seconds", "sampling_seconds", "training_seconds")


def write_tokens(path: Path, examples: int, seed: int, shortest: int = 4) -> str:
    """Writes ragged pretokenised examples with a rule to learn; returns the source."""
    rng = np.random.RandomState(seed)
    lines = []
    for _ in range(examples):
        length = int(rng.randint(shortest, SEQ - 4))
        ids = [int(rng.randint(3, VOCAB))]
        while len(ids) < length:
            noisy = rng.random_sample() < 0.2
            ids.append(int(rng.randint(3, VOCAB)) if noisy else (5 * ids[-1] + 3) % VOCAB)
        mask = [0] * (length // 3) + [1] * (length - length // 3)
        lines.append(json.dumps({"input_ids": ids, "loss_mask": mask}))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    return f"jsonl:{path}"


def run_config(directory: Path, **changes: Any) -> dict[str, Any]:
    """A config of twelve steps on two shuffled, packed sources, with evaluation and checkpoints.

    Args:
        directory: where the data is written, once.
        changes: dotted keys with `__` for the dot, set at the end; None removes one.
    """
    sources = [("a", 37, 1, 2.0), ("b", 23, 2, 1.0), ("held", 9, 3, 0.0)]
    for name, examples, seed, _ in sources:
        if not (directory / f"{name}.jsonl").exists():
            write_tokens(directory / f"{name}.jsonl", examples, seed)
    config: dict[str, Any] = {
        "seed": 3,
        "model": {"preset": "tiny-1m", "dtype": "float32", "overrides": dict(MODEL)},
        "peft": {"method": "lora", "rank": 4, "dropout": 0.1},
        "data": {
            "train": [
                {"source": f"jsonl:{directory}/{name}.jsonl", "format": "tokens", "weight": weight}
                for name, _, _, weight in sources[:2]
            ],
            "eval": [{"source": f"jsonl:{directory}/held.jsonl", "format": "tokens"}],
            "seq_len": SEQ,
            "packing": True,
        },
        "batch_size": 4,
        "grad_accum": 2,
        "total_steps": 12,
        "optim": {"lr": 1e-2, "schedule": "cosine", "warmup_steps": 3, "weight_decay": 0.01},
        "mesh": {"data": 1, "fsdp": 1},
        "checkpoint": {"every_steps": 3},
        "eval": {"every_steps": 4},
        "log": {"every_steps": 2, "tensorboard": False},
    }
    for key, value in changes.items():
        *sections, name = key.split("__")
        node = config
        for section in sections:
            node = node.setdefault(section, {})
        if value is None:
            node.pop(name, None)
        else:
            node[name] = value
    return config


def rows(workdir: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl without what a clock decides."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMINGS} for line in lines]


def steps(workdir: Path) -> list[int]:
    """The steps of the checkpoints."""
    return sorted(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit())


def arrays(workdir: Path, step: int | None = None) -> dict[str, np.ndarray]:
    """Everything that a checkpoint holds, the newest by default: parameters, optimizer, key."""
    step = steps(workdir)[-1] if step is None else step
    out = {}
    for item in ("model", "state", "feed"):
        path = (workdir / "checkpoints" / str(step) / item).absolute()
        if item == "feed" and not path.is_dir():
            continue
        with ocp.StandardCheckpointer() as reader:
            shapes = jax.tree.map(
                lambda leaf: jax.ShapeDtypeStruct(
                    leaf.shape,
                    leaf.dtype,
                    sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0]),
                ),
                reader.metadata(path).item_metadata.tree,
            )
            tree = reader.restore(path, shapes)
        out |= {f"{item}/{k}": np.asarray(v) for k, v in flatten(tree).items()}
    return out


def assert_same_run(left: Path, right: Path) -> None:
    """Two workdirs hold the same run to the bit: metrics, checkpoints, summary."""
    assert rows(left) == rows(right)
    one, two = arrays(left), arrays(right)
    assert one.keys() == two.keys() and len(one) > 5
    for name, array in one.items():
        assert array.dtype == two[name].dtype, name
        assert array.tobytes() == two[name].tobytes(), name
    clocks = ("wall_seconds", "session_seconds", "metrics")
    machine = ("cost", "memory")  # of a clock, and of all that the process has done
    first, second = (json.loads((d / "summary.json").read_text()) for d in (left, right))
    for name in clocks[:2]:
        assert first.pop(name) >= 0 and second.pop(name) >= 0
    for summary in (first, second):
        for name in machine:
            assert summary.pop(name)
        for name in TIMINGS:
            summary["metrics"].pop(name, None)
    assert first == second


def tree_hash(directory: Path) -> str:
    """A hash of every path below a directory and of every byte."""
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(directory.rglob("*")):
        digest.update(f"{path.relative_to(directory)}:".encode())
        digest.update(path.read_bytes() if path.is_file() else b"directory")
    return digest.hexdigest()
