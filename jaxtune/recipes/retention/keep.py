"""A term that keeps what a model says near to what its base says of the same tokens."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax

from jaxtune.core.errors import RequestError
from jaxtune.core.tree import Tree
from jaxtune.core.weighted import Weighted
from jaxtune.models import decoder
from jaxtune.objectives.distill import distillation_loss, forward_kl, token_divergences
from jaxtune.parallel.sequence import balanced, sequence_shards
from jaxtune.recipes.assemble import Parts
from jaxtune.recipes.base import BASE
from jaxtune.recipes.reference import adapters_off, base_of
from jaxtune.recipes.scores import INPUTS, Predictions, predicting_states

NAME = "retention_kl"  # of the term
REPLAY_KL = "replay_kl"  # of the same on replayed rows, and of its strength
# (parameters, batch, predictions of the model, dropout key) → the term
Keep = Callable[[Tree, dict[str, jax.Array], Predictions, jax.Array | None], Weighted]


def keep_of(config: Any, parts: Parts, shards: int, key: str = "kl") -> Keep | None:
    """Returns the term of a resolved config; None where its strength is 0.

    That is strength · T² · KL(base‖model), the mean over target tokens, both at temperature
    T = `retention.kl_temperature`: learning without forgetting (Li and Hoiem 2016,
    arXiv:1606.09282), whose old task is the base's own next-token distribution. The base is the
    model without what the method adds, so that there is no second one.

    Args:
        config: resolved.
        parts: the model.
        shards: over how many devices the rows of a batch are spread.
        key: of `retention`, the strength.

    Raises:
        RequestError: the method changes the base's own weights.
    """
    strength = config.retention[key]
    if not strength:
        return None
    if not adapters_off(parts, config.peft.get("init_from")):
        other = "retention.replay" if key == REPLAY_KL else "retention.l2sp or retention.ewc"
        raise RequestError(
            "needs a base that stays as it was beside what is trained, such as that of "
            f"peft.method = 'lora' without init_from; use {other}",
            key=f"retention.{key}",
        )
    temperature = config.retention.kl_temperature

    def keep(
        params: Tree, batch: dict[str, jax.Array], found: Predictions, key: jax.Array | None
    ) -> Weighted:
        apart = from_base(parts, params, batch, found, shards, key, temperature)
        return distillation_loss(apart, found.batch["loss_mask"], strength * temperature**2)

    return keep


def from_base(
    parts: Parts,
    params: Tree,
    batch: dict[str, jax.Array],
    found: Predictions,
    shards: int,
    key: jax.Array | None = None,
    temperature: float = 1.0,
) -> jax.Array:
    """Returns KL(base‖model) of the next token, float32 [B, T], at the places of `found`.

    Args:
        parts: the model, whose base stays whole.
        params: its parameters with the method's.
        batch: arrays [B, T].
        found: what the model says of it.
        shards: over how many devices the rows of a batch are spread.
        key: dropout key, or None.
        temperature: divides both models' logits.
    """
    model = parts.config
    base = jax.lax.stop_gradient(base_of(model, params))
    inputs = balanced({name: batch[name] for name in INPUTS if name in batch})
    hidden = predicting_states(model, BASE, base, inputs).states
    return token_divergences(
        forward_kl,
        (functools.partial(decoder.logits, model, parts.method, params, key=key), found.hidden),
        (functools.partial(decoder.logits, model, BASE, base), hidden),
        model.vocab_size,
        temperature=temperature,
        shards=shards,
        pieces=sequence_shards(),
    )
