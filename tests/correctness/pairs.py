"""Batches of completions laid out by hand, and the losses of objectives that read them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jaxtune.core.tree import flatten
from jaxtune.parallel.batches import global_batch
from jaxtune.parallel.mesh import batch_shards
from jaxtune.peft.method import Method
from jaxtune.recipes.objectives import OBJECTIVES
from jaxtune.recipes.rows import Rows
from jaxtune.recipes.schema.resolve import resolve
from jaxtune.training.step import mean_loss, summed_gradients, unit_weight
from tests.correctness.small import ROWS, Small

WIDTH = 32
# A prompt and its completions, each of token ids.
Sides = tuple[np.ndarray, ...]


def pair_examples(sizes: Sequence[tuple[int, ...]], seed: int = 0, vocab: int = 97) -> list[Sides]:
    """(prompt, completion, …) of each row of sizes."""
    rng = np.random.default_rng(seed)
    return [tuple(rng.integers(1, vocab, n).astype(np.int32) for n in row) for row in sizes]


def pair_batch(
    method: Method,
    rows: Sequence[Sequence[Sides]],
    weights: Sequence[float] | None = None,
    labels: Sequence[float] | None = None,
    width: int = WIDTH,
    count: int = ROWS,
) -> dict[str, Any]:
    """The batch [count, width] with these examples, each completion behind a prompt of its own.

    Written out token by token; further rows are padding. `weights` and `labels` are of the
    examples in turn.
    """
    ints = ("input_ids", "segment_ids", "positions", "completions")
    batch = {name: np.zeros((count, width), np.int32) for name in ints}
    for name in ("loss_mask", "example_weight", "ref_logprobs"):
        batch[name] = np.zeros((count, width), np.float32)
    if labels is not None:
        batch["label"] = np.zeros((count, width), np.float32)
    lead = method.num_virtual
    if lead:
        batch["virtual"] = np.full((count, width), -1, np.int32)
    number = 0
    for r, row in enumerate(rows):
        at = segment = 0
        for prompt, *completions in row:
            for completion in completions:
                segment += 1
                ids = [*prompt, *completion]
                for i in range(lead + len(ids)):
                    batch["segment_ids"][r, at] = segment
                    batch["positions"][r, at] = i
                    if i < lead:
                        batch["virtual"][r, at] = i
                    else:
                        batch["input_ids"][r, at] = ids[i - lead]
                    if i >= lead + len(prompt):
                        batch["completions"][r, at] = segment
                        batch["loss_mask"][r, at] = 1.0
                        batch["example_weight"][r, at] = 1.0 if weights is None else weights[number]
                        if labels is not None:
                            batch["label"][r, at] = labels[number]
                    at += 1
            number += 1
    return batch


def config_of(peft: dict[str, Any], objective: dict[str, Any], format: str = "preference"):
    """The resolved config that an objective's loss is made of."""
    data = {"train": [{"source": "jsonl:none", "format": format}], "seq_len": WIDTH}
    return resolve(
        {
            "model": {"preset": "tiny-1m", "tokenizer": "none"},
            "peft": peft,
            "objective": objective,
            "data": data,
            "batch_size": ROWS,
            "total_steps": 1,
            "optim": {"lr": 1e-2},
        }
    )


def measure(model: Small, config: Any, count: int = 1):
    """Returns a batch → (mean loss, {metric: mean}, {path: mean gradient}), compiled once.

    Args:
        model: with random parameters.
        config: as `config_of` gives it.
        count: micro-batches.
    """
    loss = OBJECTIVES[config.objective.name].trained(
        config, model.parts, Rows(batch_shards(model.mesh))
    )

    @jax.jit
    def run(trainable, frozen, batch):
        losses, metrics, grads = summed_gradients(
            loss, trainable, frozen, batch, jax.random.key(0), count
        )
        weight = unit_weight(losses)
        means = {name: value.mean() for name, value in metrics.items()}
        return mean_loss(losses), means, jax.tree.map(lambda g: g / weight, grads)

    def on(batch: dict[str, Any]):
        trainable, frozen = model.parts.split(model.params)
        with jax.set_mesh(model.mesh):
            loss, metrics, grads = run(trainable, frozen, global_batch(batch, model.mesh))
        flat = {p: np.asarray(g) for p, g in flatten(grads).items() if g is not None}
        return float(loss), {name: float(value) for name, value in metrics.items()}, flat

    return on


def assert_same(one, two, tolerance: float = 1e-5) -> None:
    """Losses, metrics and gradients, those relative to the largest of their leaf."""
    np.testing.assert_allclose(one[0], two[0], rtol=tolerance)
    for name, value in one[1].items():
        np.testing.assert_allclose(value, two[1][name], rtol=tolerance, atol=1e-6, err_msg=name)
    assert one[2].keys() == two[2].keys()
    for path, a in one[2].items():
        scale = max(np.abs(a).max(), np.abs(two[2][path]).max())
        np.testing.assert_allclose(a, two[2][path], rtol=0, atol=tolerance * scale, err_msg=path)
