"""GRPO and its kin: policy gradients with advantages from groups of samples, no value function."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from jaxtune.core.errors import RequestError
from jaxtune.core.tree import Tree, combine
from jaxtune.core.weighted import Weighted, weighted
from jaxtune.data.batches import Batch
from jaxtune.models import decoder
from jaxtune.objectives import kl, policy
from jaxtune.objectives.advantages import ADVANTAGES, penalised_returns, token_batch_normalised
from jaxtune.objectives.sft import router_balance
from jaxtune.recipes import online, online_told
from jaxtune.recipes.assemble import Parts
from jaxtune.recipes.objective import Objective
from jaxtune.recipes.online import Credit
from jaxtune.recipes.online_told import KL_COEF
from jaxtune.recipes.policy import View, base_reference, view
from jaxtune.recipes.prompt_data import open_prompts
from jaxtune.recipes.reference import adapters_off
from jaxtune.recipes.rows import Rows
from jaxtune.recipes.scores import chunk_bytes
from jaxtune.training.step import Loss, SumLoss

COUNT = 1  # completions of a row
WHOLE_BATCH = "batch"  # advantages that a KL in the reward makes a token's own

# Name in a config → log-ratios [B, T] of (log-probabilities, old ones, completions, count)
RATIOS: dict[str, Callable[..., jax.Array]] = {
    "token": lambda new, old, *_: policy.token_log_ratio(new, old),
    "sequence": policy.mean_log_ratio,
    "total": policy.total_log_ratio,
}

# (objective section, losses [B, T], weights [B, T], completions [B, T]) → the mean's parts
Normalise = Callable[[Any, jax.Array, jax.Array, jax.Array], Weighted]
NORMALISERS: dict[str, Normalise] = {
    "token": lambda o, losses, weights, _: policy.by_token(losses, weights),
    "sequence": lambda o, *arrays: policy.by_sequence(*arrays, COUNT),
    "constant": lambda o, *arrays: policy.by_constant(*arrays, COUNT, o.max_new_tokens),
}


def policy_terms(
    o: Any, seen: View, ratio: str, normaliser: str
) -> tuple[dict[str, Weighted], dict[str, Weighted]]:
    """Returns (terms of the loss, metrics) of a batch under a policy.

    A KL in the loss is charged to the token, so that it is normalised as the policy's loss is.

    Args:
        o: the resolved `objective` section.
        seen: the policy on the batch.
        ratio, normaliser: of `RATIOS` and `NORMALISERS`.
    """
    batch = seen.batch
    weights, completions = batch["loss_mask"], batch["completions"]
    log_ratio = RATIOS[ratio](seen.logprobs, batch["old_logprobs"], completions, COUNT)
    losses = policy.clipped(log_ratio, batch["advantages"], o.clip_low, o.clip_high, o.clip_dual)
    metrics = policy.policy_metrics(
        log_ratio, batch["advantages"], weights, o.clip_low, o.clip_high
    )
    metrics["entropy"] = weighted(jax.lax.stop_gradient(seen.entropy), weights)
    if o.kl_coef:
        estimates = kl.k3(jax.lax.stop_gradient(seen.logprobs), batch["ref_logprobs"])
        metrics["kl"] = weighted(estimates, weights)
        if o.kl_in == "loss":
            charged = seen.kl
            if charged is None:
                charged = kl.LOSSES[o.kl_estimator](seen.logprobs, batch["ref_logprobs"])
            losses = losses + batch[KL_COEF] * charged
    terms = {"policy": NORMALISERS[normaliser](o, losses, weights, completions)}
    if o.entropy_coef:
        terms["entropy"] = policy.entropy_term(seen.entropy, weights, o.entropy_coef)
    if seen.balance is not None:
        uneven = router_balance(seen.balance, weights)
        metrics["router_balance"] = uneven
        if o.balance:
            terms["balance"] = Weighted(o.balance * uneven.sum, uneven.weight)
    return terms, metrics


def grpo_loss(config: Any, parts: Parts, rows: Rows) -> SumLoss:
    """Returns the loss of a batch of rollouts; see `training.step.SumLoss`.

    Raises:
        RequestError: see `check_exact`.
    """
    o = config.objective
    check_exact(config, parts)

    def sum_loss(
        trainable: Tree, frozen: Tree, batch: dict[str, jax.Array], key: jax.Array | None
    ) -> tuple[Loss, dict[str, Weighted]]:
        seen = look(config, parts, rows.shards, trainable, frozen, batch)
        terms, metrics = policy_terms(o, seen, o.ratio, o.normaliser)
        return plain(terms), metrics

    return sum_loss


def look(
    config: Any, parts: Parts, shards: int, trainable: Tree, frozen: Tree, batch: dict
) -> View:
    """Returns the View of the policy that is trained."""
    o = config.objective
    params = combine(trainable, decoder.with_gathered_head(parts.config, frozen))
    return view(
        parts.config,
        parts.method,
        params,
        batch,
        o.temperature,
        shards=shards,
        logits_bytes=chunk_bytes(parts.config, trainable, shards),
        train_entropy=o.entropy_coef > 0,
        reference=base_reference(parts.config, params) if exact_loss(o) else None,
        most=online.head_tokens(config, None),
    )


def exact_loss(o: Any) -> bool:
    """Tells whether the loss has the exact KL, for which the step computes the reference too."""
    return o.kl_coef > 0 and o.kl_in == "loss" and o.kl_estimator == "exact"


def check_exact(config: Any, parts: Parts) -> None:
    """Raises RequestError if the loss needs a reference that the step does not have."""
    if exact_loss(config.objective) and not adapters_off(parts, config.peft.get("init_from")):
        raise RequestError(
            "'exact' in the loss needs the base as reference, and this run starts from another "
            "policy or trains the base's own weights; use k1, k2 or k3, or objective.kl_in=reward",
            key="objective.kl_estimator",
        )


def plain(terms: dict[str, Weighted]) -> Loss:
    """Returns the terms as a loss; the only one is the loss itself."""
    return terms if len(terms) > 1 else next(iter(terms.values()))


def credit(
    o: Any,
    rewards: np.ndarray,
    rows: Batch,
    seen: Mapping[str, np.ndarray],
    coefficient: float,
) -> Credit:
    """Returns the advantages of an iteration; see `online.GiveCredit`.

    A KL in the reward is summed over the completion where samples of a prompt are compared, and
    over what follows a token where the whole batch is (REINFORCE++).
    """
    mask = rows["loss_mask"]
    if not (o.kl_coef and o.kl_in == "reward"):
        given = ADVANTAGES[o.advantage](rewards).reshape(-1, 1)
        return Credit({"advantages": given * (mask > 0)}, {})
    charge = online.charged(o, seen)
    if o.advantage == WHOLE_BATCH:
        returns = penalised_returns(np.nan_to_num(rewards.reshape(-1)), charge, mask, coefficient)
        return Credit({"advantages": token_batch_normalised(returns, mask)}, {})
    whole = np.where(mask > 0, charge, 0.0).sum(1).reshape(rewards.shape)
    penalised = rewards - coefficient * whole
    given = ADVANTAGES[o.advantage](penalised).reshape(-1, 1)
    scored = penalised[~np.isnan(penalised)]
    told = {"penalised_reward": float(scored.mean()) if scored.size else 0.0}
    return Credit({"advantages": given * (mask > 0)}, told)


OBJECTIVE = Objective(
    trained=grpo_loss,
    held_out=None,
    term="policy",
    likelihood=False,
    open_data=open_prompts,
    open_feed=functools.partial(online.open_feed, credit=credit),
    evaluate=online.evaluate,
    padding=online.padding,
    show=online_told.show,
    metrics=online_told.names,
    keeps_start=online.keeps_start,
    head_tokens=online.head_tokens,
)
