"""Logits of tiny models on ragged rows, and random parameters that no slot leaves trivial."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.core.tree import map_paths
from jaxtune.models.config import ModelConfig
from jaxtune.models.decoder import abstract_params, hidden_states, logits
from jaxtune.peft.method import Method

CONFIG = ModelConfig(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_position_embeddings=96,
    dtype="float32",
)
BASE = Method()


def random_params(config: ModelConfig, method: Method, seed: int = 0):
    """Parameters of about the size that trained ones have, nothing at the method's identity."""
    rng = np.random.default_rng(seed)

    def draw(path: str, leaf):
        noise = rng.standard_normal(leaf.shape, np.float32)
        if path.endswith(("scale", "magnitude")):
            return jnp.asarray(1.0 + 0.2 * noise)
        if path.endswith("embedding"):
            return jnp.asarray(noise)
        if path.endswith(("/b", "/b0")):
            return jnp.asarray(0.1 * noise)
        width = leaf.shape[-2] if len(leaf.shape) > 1 and path.endswith(("kernel", "/a")) else 4
        return jnp.asarray(noise * width**-0.5)

    return map_paths(draw, abstract_params(config, method))


def probe(config: ModelConfig = CONFIG, lengths=(23, 9, 16), seed: int = 5) -> list[list[int]]:
    """Ragged rows of token ids."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, config.vocab_size, n).tolist() for n in lengths]


def batch_of(method: Method, rows: list[list[int]], side: str = "right") -> dict[str, np.ndarray]:
    """One segment a row, padded on `side`; virtual tokens stand before the real ones."""
    lead = method.num_virtual
    width = lead + max(map(len, rows))
    names = ("input_ids", "segment_ids", "positions")
    batch = {name: np.zeros((len(rows), width), np.int32) for name in names}
    if lead:
        batch["virtual"] = np.full((len(rows), width), -1, np.int32)
    for i, row in enumerate(rows):
        full = lead + len(row)
        start = width - full if side == "left" else 0
        batch["input_ids"][i, start + lead : start + full] = row
        batch["segment_ids"][i, start : start + full] = 1
        batch["positions"][i, start : start + full] = np.arange(full)
        if lead:
            batch["virtual"][i, start : start + lead] = np.arange(lead)
    return batch


@functools.partial(jax.jit, static_argnums=(0, 1))
def run(config: ModelConfig, method: Method, params, batch):
    """Logits [B, T, V] without dropout."""
    return logits(config, method, params, hidden_states(config, method, params, batch)[0])


def logits_of(config, method, params, rows, side: str = "right") -> list[np.ndarray]:
    """[len, V] logits of the real tokens of each row."""
    batch = batch_of(method, rows, side)
    out = np.asarray(run(config, method, params, batch))
    return [
        one[keep][method.num_virtual :]
        for one, keep in zip(out, batch["segment_ids"] == 1, strict=True)
    ]


def assert_same_logits(left, right, tolerance: float = 1e-4) -> None:
    """Compares two results of `logits_of`."""
    for a, b in zip(left, right, strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)
