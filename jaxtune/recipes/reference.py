"""The reference of a preference objective: the policy as it was at step 0.

It costs no second model. Where a method's additions start as the identity and no weight of the
base is trained, the reference is the base: the same parameters without the additions, inside the
same compiled step. Otherwise the log-probabilities of the start are a column of the data
(`ref_logprobs`), computed before training; see `recipes.reference_data`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax

from jaxtune.core.tree import Tree, flatten, unflatten
from jaxtune.models.config import ModelConfig
from jaxtune.models.decoder import abstract_params
from jaxtune.peft.method import FROZEN
from jaxtune.recipes.assemble import Parts
from jaxtune.recipes.base import BASE
from jaxtune.recipes.objective import Objective
from jaxtune.recipes.scores import INPUTS, predictions

COLUMN = "ref_logprobs"
# How far the first batch may be from the reference: relative for the loss, in nats a token for the
# log-probabilities. Two programs compute them, and bfloat16 keeps 8 bits.
TOLERANCES = {"float32": 1e-4, "bfloat16": 2e-2}


class WrongReference(RuntimeError):
    """The policy at step 0 is not the reference."""


def adapters_off(parts: Parts, init_from: str | None) -> bool:
    """Tells whether the start of a run is its base without what the method adds.

    A value head, which is trained beside a policy, has no part in what the policy says.

    Args:
        parts: the model.
        init_from: adapter directory that training starts from, or None.
    """
    if init_from is not None or not parts.method.starts_as_base:
        return False
    kinds, model = flatten(parts.labels), dataclasses.replace(parts.config, score_head=False)
    return all(kinds[path] == FROZEN for path in flatten(abstract_params(model, BASE)))


def needs_column(objective: Objective, config: Any, parts: Parts) -> bool:
    """Tells whether a run's reference is a column of its data.

    Args:
        objective: of the run.
        config: resolved.
        parts: the model.
    """
    referred = objective.at_start is not None
    return referred and not adapters_off(parts, config.peft.get("init_from"))


def base_of(config: ModelConfig, params: Tree) -> Tree:
    """Returns a base's parameters out of those of a model with a method."""
    held = flatten(params)
    return unflatten({path: held[path] for path in flatten(abstract_params(config, BASE))})


def base_logprobs(
    config: ModelConfig,
    params: Tree,
    batch: dict[str, jax.Array],
    shards: int,
    most: int | None = None,
) -> jax.Array:
    """Returns the log-probabilities [B, T] of a batch's targets under the base, without gradient.

    Args:
        config: the model.
        params: its parameters with a method's.
        batch, shards, most: as for `scores.predictions`, at whose places the result stands.
    """
    base = jax.lax.stop_gradient(base_of(config, params))
    inputs = {name: array for name, array in batch.items() if name in (*INPUTS, "loss_mask")}
    return predictions(config, BASE, base, inputs, shards=shards, most=most).scores.logprobs


def check_start(wanted: float | None, found: Mapping[str, float], dtype: str) -> None:
    """Raises WrongReference unless the policy is its reference (CORRECTNESS C21).

    Args:
        wanted: the loss of pairs where policy and reference are one; None: the data decide it.
        found: means over a batch before the first update: `loss/preference` or `loss`, `margin`
            where there are pairs, and `drift`, |log π − log π_ref| a token in nats.
        dtype: of the computation.
    """
    allowed = TOLERANCES[dtype]
    if not found["drift"] <= allowed:
        raise WrongReference(
            f"policy and reference differ by {found['drift']:.3g} nats a token before the first "
            f"update, more than {allowed:g}: the reference is not the policy at step 0"
        )
    loss = found.get("loss/preference", found["loss"])
    if wanted is not None and not math.isclose(loss, wanted, rel_tol=10 * allowed):
        raise WrongReference(
            f"the preference loss of the first batch is {loss:.6g} before the first update; where "
            f"policy and reference are one it is {wanted:.6g}"
        )
