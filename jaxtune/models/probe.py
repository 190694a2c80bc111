"""Keys and values of the base model, from which prefix tuning starts."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from jaxtune.core.errors import RequestError
from jaxtune.core.tree import Tree, flatten, unflatten
from jaxtune.models.cache import empty_cache
from jaxtune.models.config import ModelConfig
from jaxtune.models.decoder import abstract_params, hidden_states
from jaxtune.peft.method import Method, Probe

BASE = Method()


def probe(config: ModelConfig, params: Tree) -> Probe:
    """Returns the Probe of `peft.method` for these weights.

    Args:
        config: the model.
        params: a parameter tree that holds the base's; what a method added is left out.

    Returns:
        A function: ids int [1, P] → (keys, values), each [L, P, K*H] in the compute dtype, the
        keys rotated to positions 0 … P-1. It raises RequestError when P exceeds the model's
        positions.
    """
    wanted, given = flatten(abstract_params(config, BASE)), flatten(params)
    base = unflatten({path: given[path] for path in wanted})

    def run(ids: jax.Array) -> tuple[jax.Array, jax.Array]:
        if ids.shape[1] > config.max_position_embeddings:
            raise RequestError(
                f"{ids.shape[1]} tokens exceed the model's {config.max_position_embeddings} "
                "positions (max_position_embeddings)",
                key="peft.num_tokens",
            )
        return _keys_and_values(config)(base, ids)

    return run


@functools.cache
def _keys_and_values(config: ModelConfig):
    @jax.jit
    def run(base: Tree, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
        count = ids.shape[1]
        batch = {
            "input_ids": ids.astype(jnp.int32),
            "segment_ids": jnp.ones((1, count), jnp.int32),
            "positions": jnp.arange(count, dtype=jnp.int32)[None],
        }
        empty = empty_cache(config, 1, count)
        cache = hidden_states(config, BASE, base, batch, cache=empty).cache
        shape = (config.num_layers, count, config.num_kv_heads * config.head_dim)
        keys, values = (a.swapaxes(2, 3).reshape(shape) for a in (cache.keys, cache.values))
        return keys, values

    return run
