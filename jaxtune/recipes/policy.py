"""What a policy says of sampled tokens: log-probabilities, entropies, values."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from jaxtune.core.tree import Tree
from jaxtune.models import decoder
from jaxtune.models.config import ModelConfig
from jaxtune.objectives.chunks import LOGITS_BYTES
from jaxtune.objectives.logprobs import policy_scores
from jaxtune.parallel.sequence import balanced, sequence_shards
from jaxtune.peft.method import Method
from jaxtune.recipes.base import BASE
from jaxtune.recipes.reference import base_of
from jaxtune.recipes.scores import (
    INPUTS,
    at_places,
    at_targets,
    head_places,
    put_back,
    target_side,
)


class View(NamedTuple):
    """A policy on a batch; arrays [B, T] stand at the places that predict, as `scores` has them.

    Attributes:
        logprobs: float32 [B, T], ln p of each target at the policy's temperature.
        entropy: float32 [B, T], nats, at that temperature.
        kl: float32 [B, T], exact KL from the reference at that temperature, nats; None without one.
        values: float32 [B, T], of the states in which targets are chosen; None without a value
            head.
        batch: the batch's target-side arrays, with `targets`.
        balance: load-balancing loss of each row, float32 [B]; None without experts.
    """

    logprobs: jax.Array
    entropy: jax.Array
    kl: jax.Array | None
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
    train_entropy: bool = False,
    reference: tuple[Method, Tree] | None = None,
    most: int | None = None,
) -> View:
    """Returns the View of a batch under a policy; dropout is off.

    Args:
        config, method, params: the model.
        batch: arrays [B, T]; see `data.batches`.
        temperature: that the tokens were sampled with; it divides the logits (CORRECTNESS C25).
        shards: over how many devices the rows are spread.
        logits_bytes: see `chunks.in_chunks`.
        train_entropy: whether the entropy has a gradient.
        reference: method and parameters of the model that the exact KL is measured from.
        most: a number that the sampled tokens of a row never exceed. The head then runs on so many
            tokens a row, and what it says elsewhere is 0. None: on all tokens.
    """
    batch = balanced(target_side(batch))
    inputs = {name: batch.pop(name) for name in INPUTS if name in batch}
    hidden = decoder.hidden_states(config, method, params, inputs)
    sampled = None if most is None else batch["completions"] > 0
    places, other = head_places(sampled, most), None
    if reference is not None:
        model = (config, reference[0], jax.lax.stop_gradient(reference[1]))
        other = (
            functools.partial(decoder.logits, *model),
            at_places(decoder.hidden_states(*model, inputs).states, places),
        )
    scores = policy_scores(
        functools.partial(decoder.logits, config, method, params),
        at_places(hidden.states, places),
        at_places(batch["targets"], places),
        config.vocab_size,
        temperature=temperature,
        train_entropy=train_entropy,
        reference=other,
        logits_bytes=logits_bytes,
        shards=shards,
        pieces=sequence_shards(),
    )
    if places is not None:
        scores = jax.tree.map(lambda found: put_back(found, sampled), scores)
    values = None
    if config.score_head:
        values = decoder.scores(config, method, params, hidden.states)
    return View(scores.logprobs, scores.entropy, scores.kl, values, batch, hidden.balance)


def base_reference(config: ModelConfig, params: Tree) -> tuple[Method, Tree]:
    """Returns the reference of `view` that is a model without what its method adds."""
    return BASE, base_of(config, params)


def observer(
    config: ModelConfig,
    method: Method,
    temperature: float,
    shards: int,
    exact: bool = False,
    most: int | None = None,
) -> Callable[..., dict[str, jax.Array]]:
    """Returns (params, reference's params or None, batch) → what is seen of rollouts, [B, T].

    `logprobs`, `values` with a value head; with a reference `ref_logprobs`, and with
    `exact` also `kl`. The values stand at the tokens; 0 at the first, which nothing predicts.
    `most` is as of `view`.
    """

    def observe(params: Tree, start: Tree | None, batch: dict[str, Any]) -> dict[str, jax.Array]:
        look = functools.partial(
            view, config, method, temperature=temperature, shards=shards, most=most
        )
        both = exact and start is not None
        seen = look(params, batch, reference=(method, start) if both else None)
        found = {
            "logprobs": seen.logprobs,
            "values": seen.values,
            "kl": seen.kl,
        }
        if start is not None:
            found["ref_logprobs"] = look(start, batch).logprobs
        return {name: at_targets(x) for name, x in found.items() if x is not None}

    return observe
