"""Which heads a model has, by what it is trained for."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxtune.core.errors import RequestError
from jaxtune.core.tree import Tree, flatten, unflatten
from jaxtune.models.config import ModelConfig
from jaxtune.peft.method import SCORE
from jaxtune.recipes.base import Base, base_shardings


class Heads(NamedTuple):
    """What reads the last hidden states: logits of the next token, and a scalar."""

    lm: bool = True
    score: bool = False


LANGUAGE_MODEL, REWARD_MODEL = Heads(), Heads(lm=False, score=True)
# By objective; those that are not here train a language model.
HEADS = {"reward": REWARD_MODEL, "ppo": Heads(score=True)}


def heads_of(objective: str) -> Heads:
    """Returns the heads of a model that is trained for an objective."""
    return HEADS.get(objective, LANGUAGE_MODEL)


def headed(config: ModelConfig, heads: Heads) -> ModelConfig:
    """Returns the config of a model with the same layers and these heads."""
    tied = config.tie_embeddings and heads.lm
    return dataclasses.replace(
        config, lm_head=heads.lm, score_head=heads.score, tie_embeddings=tied
    )


def with_heads(base: Base, heads: Heads, where: object | None = None) -> Base:
    """Returns the base with these heads: those that are not wanted are let go of.

    A score head that the base lacks starts at 0, so that every score is 0.

    Args:
        base: a language model or a reward model.
        heads: what is wanted.
        where: its directory, for messages.

    Raises:
        RequestError: the base is a reward model, and a language model is wanted.
    """
    config = headed(base.config, heads)
    if config == base.config:
        return base
    if heads.lm and not base.config.lm_head:
        raise RequestError(
            "is a reward model, which has no logits to train; give a language model",
            key="model.path",
            where=where,
        )

    def load(dtype_of: Callable[[str], Any], mesh: Mesh, quantize: str = "none") -> Tree:
        places = flatten(base_shardings(dataclasses.replace(config, quantize=quantize), mesh))

        def dtype(path: str) -> Any:
            return dtype_of(path) if path in places else config.compute_dtype

        params = flatten(base.load(dtype, mesh, quantize))
        if SCORE in places and SCORE not in params:
            zeros = jax.jit(
                lambda: jnp.zeros((config.hidden_size, 1), dtype_of(SCORE)),
                out_shardings=places[SCORE],
            )
            params[SCORE] = zeros()
        return unflatten({path: params[path] for path in places})

    return dataclasses.replace(base, config=config, load=load)
