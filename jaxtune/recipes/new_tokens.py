"""`model.add_tokens`: a base with more tokens than it was trained with."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxtune.core.errors import RequestError
from jaxtune.core.tree import Tree, flatten, unflatten
from jaxtune.recipes.base import Base, base_shardings

KEY = "model.add_tokens"


def with_new_tokens(base: Base, tokens: Sequence[str]) -> Base:
    """Returns the base with rows for new tokens, each the mean of the rows that it had.

    The rows of the table are frozen like the rest of the base; `Base.new_rows` names those that a
    method trains in their place. Rows that pad a vocabulary are used up first.

    Raises:
        RequestError: there is no tokenizer, or it has one of the tokens.
    """
    if base.tokenizer is None:
        raise RequestError("needs a tokenizer; set model.tokenizer", key=KEY)
    start = base.tokenizer.vocab_size
    tokenizer = base.tokenizer.with_tokens(tokens, KEY)
    old = base.config.vocab_size
    config = dataclasses.replace(base.config, vocab_size=max(old, tokenizer.vocab_size))

    def load(dtype_of: Callable[[str], Any], mesh: Mesh, quantize: str = "none") -> Tree:
        params = flatten(base.load(dtype_of, mesh, quantize))
        places = flatten(base_shardings(config, mesh))
        for path, axis in (("embed/embedding", 0), ("lm_head/kernel", 1)):
            if path in params:
                grow = jax.jit(grown, static_argnums=(1, 2, 3), out_shardings=places[path])
                params[path] = grow(params[path], axis, start, tokenizer.vocab_size)
        return unflatten(params)

    rows = (start, len(tokens))
    return dataclasses.replace(base, config=config, load=load, tokenizer=tokenizer, new_rows=rows)


def grown(table: jax.Array, axis: int, start: int, stop: int) -> jax.Array:
    """Returns a table with rows start:stop along an axis, each the mean of those before `start`."""
    mean = jnp.mean(
        jax.lax.slice_in_dim(table, 0, start, axis=axis).astype(jnp.float32), axis, keepdims=True
    )
    shape = [*table.shape]
    shape[axis] = stop - start
    fresh = jnp.broadcast_to(mean, shape).astype(table.dtype)
    parts = [jax.lax.slice_in_dim(table, 0, start, axis=axis), fresh]
    if stop < table.shape[axis]:
        parts.append(jax.lax.slice_in_dim(table, stop, None, axis=axis))
    return jnp.concatenate(parts, axis)
