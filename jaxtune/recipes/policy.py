"""What a policy says of sampled tokens: log-probabilities, entropies, values."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxtune.core.tree import Tree
from jaxtune.models import decoder
from jaxtune.models.config import ModelConfig
from jaxtune.objectives.logprobs import LOGITS_BYTES, policy_scores, token_scores
from jaxtune.parallel.sequence import balanced, restored, sequence_shards
from jaxtune.peft.method import Method
from jaxtune.recipes.scores import INPUTS, target_side


class View(NamedTuple):
    """A policy on a batch; arrays [B, T] stand at the places that predict, as `scores` has them.

    Attributes:
        logprobs: float32 [B, T], ln p of each target at the policy's temperature.
        entropy: float32 [B, T], nats, at that temperature.
        values: float32 [B, T], of the states in which targets are chosen; None without a value
            head.
        batch: the batch's target-side arrays, with `targets`.
        balance: load-balancing loss of each row, float32 [B]; None without experts.
    """

    logprobs: jax.Array
    entropy: jax.Array
    values: jax.Array | None
    batch: dict[str, jax.Array]
    balance: jax.Array | None


def view(
    config: ModelConfig,
    method: Method,
    params: Tree,
    batch: dict[str, jax.Array],
    temperature: float,
    *,
    shards: int = 1,
    logits_bytes: int = LOGITS_BYTES,
) -> View:
    """Returns the View of a batch under a policy; dropout is off.

    Args:
        config, method, params: the model.
        batch: arrays [B, T]; see `data.batches`.
        temperature: that the tokens were sampled with; it divides the logits (CORRECTNESS C25).
        shards: over how many devices the rows are spread.
        logits_bytes: see `token_scores`.
    """
    batch = balanced(target_side(batch))
    inputs = {name: batch.pop(name) for name in INPUTS if name in batch}
    hidden = decoder.hidden_states(config, method, params, inputs)
    scores = token_scores(
        lambda states: decoder.logits(config, method, params, states) / temperature,
        hidden.states,
        batch["targets"],
        config.vocab_size,
        logits_bytes=logits_bytes,
        shards=shards,
        pieces=sequence_shards(),
        score=policy_scores,
    )
    values = None
    if config.score_head:
        values = decoder.scores(config, method, params, hidden.states)
    return View(scores.logprobs, scores.entropy, values, batch, hidden.balance)


def at_tokens(values: jax.Array) -> jax.Array:
    """Returns values [B, T] of the places that predict at the tokens themselves, in row order."""
    return jnp.pad(restored(values)[:, :-1], ((0, 0), (1, 0)))


def observer(config: ModelConfig, method: Method, temperature: float, shards: int) -> Callable:
    """Returns the function (params, batch) → {"logprobs", "entropy"[, "values"]} [B, T].

    The values stand at the tokens; 0 at the first, which nothing predicts.
    """

    def observe(params: Tree, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        seen = view(config, method, params, batch, temperature, shards=shards)
        found = {"logprobs": seen.logprobs, "entropy": seen.entropy, "values": seen.values}
        return {name: at_tokens(x) for name, x in found.items() if x is not None}

    return observe
