"""A tiny random model under every method, far enough from the base that a lost slot is seen."""

import functools
import zlib

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.core.tree import map_paths
from jaxtune.models.config import ModelConfig
from jaxtune.models.decoder import abstract_params, hidden_states, logits
from jaxtune.peft.registry import METHODS

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
OPTIONS = {
    "lora": {"rank": 4},
    "adapter": {"bottleneck": 8, "placement": "houlsby"},
    "prompt": {"num_tokens": 3},
    "prefix": {"num_tokens": 3},
}


def method_of(name: str):
    return METHODS[name](**OPTIONS.get(name, {}))


@functools.cache
def model(name: str, config: ModelConfig = CONFIG):
    """(config, method, params): random everywhere, nothing at the method's identity.

    A leaf is drawn by its path, so that all methods share the base's weights.
    """
    method = method_of(name)

    def draw(path: str, leaf):
        noise = np.random.default_rng(zlib.crc32(path.encode()))
        around = 1.0 if path.endswith("scale") else 0.0
        return jnp.asarray(around + 0.3 * noise.standard_normal(leaf.shape, np.float32))

    return config, method, map_paths(draw, abstract_params(config, method))


def one_row(method, ids: list[int], slots: int) -> dict[str, np.ndarray]:
    """The batch of one right-padded row, written out by hand."""
    lead = method.num_virtual
    full = lead + len(ids)
    batch = {name: np.zeros((1, slots), np.int32) for name in ("input_ids", "segment_ids")}
    batch["positions"] = np.zeros((1, slots), np.int32)
    batch["input_ids"][0, lead:full] = ids
    batch["segment_ids"][0, :full] = 1
    batch["positions"][0, :full] = np.arange(full)
    if lead:
        batch["virtual"] = np.full((1, slots), -1, np.int32)
        batch["virtual"][0, :lead] = np.arange(lead)
    return batch


@functools.cache
def _run(config, method):
    return jax.jit(
        lambda params, batch: logits(
            config, method, params, hidden_states(config, method, params, batch)[0]
        )
    )


def row_logits(name: str, ids: list[int], config: ModelConfig = CONFIG, slots: int = 48):
    """float32 [len(ids), V] of one row run whole, without cache or padding on the left."""
    config, method, params = model(name, config)
    out = _run(config, method)(params, one_row(method, ids, slots))
    return np.asarray(out)[0, method.num_virtual :][: len(ids)]


def greedy_oracle(name: str, prompt: list[int], count: int, config: ModelConfig = CONFIG):
    """The argmax continuation, the whole row run again for each token."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(jnp.argmax(row_logits(name, ids, config)[-1])))
    return ids[len(prompt) :]
