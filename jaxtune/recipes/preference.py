"""Preference optimization from pairs: DPO, ORPO, SimPO and CPO."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxtune.core.tree import Tree, combine
from jaxtune.core.weighted import Weighted, weighted
from jaxtune.models import decoder
from jaxtune.models.config import ModelConfig
from jaxtune.objectives import completions as of
from jaxtune.objectives.completions import Pair
from jaxtune.objectives.cpo import cpo_term
from jaxtune.objectives.dpo import LOSSES, dpo_loss, nll_term, preference_metrics
from jaxtune.objectives.orpo import odds_ratio_term
from jaxtune.objectives.sft import router_balance
from jaxtune.objectives.simpo import simpo_loss
from jaxtune.peft.method import Method
from jaxtune.recipes.assemble import Parts
from jaxtune.recipes.objective import Objective, targets_alone
from jaxtune.recipes.reference import COLUMN, adapters_off, base_logprobs
from jaxtune.recipes.retention.keep import NAME, Keep, keep_of
from jaxtune.recipes.rows import Rows
from jaxtune.recipes.scores import Predictions, chunk_bytes, predictions
from jaxtune.training.step import Loss, Metrics, SumLoss

# What a loss is called in the metrics of training and evaluation.
CALLED = {"rewards/margin": "margin", "rewards/accuracy": "accuracy"}


class Sides(NamedTuple):
    """What a loss of pairs is made of.

    Attributes:
        policy: log-probabilities of the completions, summed over tokens, each [B, P].
        reference: the same under the reference, or None.
        lengths: tokens of the completions, each [B, P].
        weights: float32 [B, P], 0 where there is no pair.
    """

    policy: Pair
    reference: Pair | None
    lengths: Pair
    weights: jax.Array

    @property
    def averages(self) -> Pair:
        """The policy's log-probabilities a token, each [B, P]."""
        return Pair(
            *(v / jnp.maximum(n, 1) for v, n in zip(self.policy, self.lengths, strict=True))
        )


# The pairs of a batch → (their loss, metrics).
Term = Callable[[Sides], tuple[Weighted, Metrics]]
# (parameters, batch, predictions of the policy) → reference log-probabilities [B, T].
Reference = Callable[[Tree, dict[str, jax.Array], Predictions], jax.Array]


def most_completions(rows: Rows, tokens: int) -> int:
    """Returns how many completions a row may hold, even: a pair has at least three tokens."""
    return rows.completions + rows.completions % 2 if rows.completions else 2 * max(1, tokens // 3)


def preference_loss(
    config: ModelConfig,
    method: Method,
    rows: Rows,
    term: Term,
    *,
    reference: Reference | None = None,
    nll_weight: float = 0.0,
    balance: float = 0.0,
    keep: Keep | None = None,
) -> SumLoss:
    """Returns the summed loss of a batch of pairs; see `training.step.SumLoss`.

    The policy and its reference each run once over the rows, whose completions are told apart
    afterwards.

    Args:
        config, method: the model.
        rows: what is known of the rows of a batch.
        term: the loss of pairs.
        reference: gives the reference's log-probabilities; None: there is none.
        nll_weight: coefficient of the mean NLL a token of the chosen completions.
        balance: coefficient of the load-balancing loss of a model with experts.
        keep: a further term; None: none.
    """

    def sum_loss(
        trainable: Tree, frozen: Tree, batch: dict[str, jax.Array], key: jax.Array | None
    ) -> tuple[Loss, Metrics]:
        params = combine(trainable, decoder.with_gathered_head(config, frozen))
        found = predictions(
            config,
            method,
            params,
            batch,
            key,
            shards=rows.shards,
            logits_bytes=chunk_bytes(config, trainable, rows.shards),
            most=rows.targets,
        )
        completions, logprobs = found.batch["completions"], found.scores.logprobs
        count = most_completions(rows, completions.shape[1])

        def sides(values: jax.Array) -> Pair:
            return of.pairs(of.totals(values, completions, count))

        fixed = None if reference is None else reference(params, batch, found)
        lengths = of.pairs(of.lengths(completions, count))
        weights = of.pair_weights(completions, count, found.batch.get("example_weight"))
        main, metrics = term(
            Sides(sides(logprobs), None if fixed is None else sides(fixed), lengths, weights)
        )
        metrics = {CALLED.get(name, name): value for name, value in metrics.items()}
        if fixed is not None:
            metrics["drift"] = weighted(jnp.abs(logprobs - fixed), completions > 0)
        losses = {"preference": main}
        if nll_weight:
            chosen = of.chosen_tokens(completions)
            losses["nll"] = nll_term(logprobs, chosen, nll_weight)
        if found.balance is not None:
            uneven = router_balance(found.balance, found.batch["loss_mask"])
            metrics["router_balance"] = uneven
            if balance:
                losses["balance"] = Weighted(balance * uneven.sum, uneven.weight)
        if keep is not None:
            losses[NAME] = keep(params, batch, found, key)
        return main if len(losses) == 1 else losses, metrics

    return sum_loss


def base_reference(config: ModelConfig, rows: Rows) -> Reference:
    """Returns the reference of a run that starts as its base."""
    return lambda params, batch, _: base_logprobs(config, params, batch, rows.shards, rows.targets)


def reference_of(config: Any, parts: Parts, rows: Rows) -> Reference:
    """Returns what gives the reference's log-probabilities in a run of a resolved config."""
    if adapters_off(parts, config.peft.get("init_from")):
        return base_reference(parts.config, rows)
    return lambda params, batch, found: found.batch[COLUMN]


def dpo_term(objective: Any) -> Term:
    """Returns the loss of pairs of a resolved `objective` section with the name dpo."""
    kind = LOSSES[objective.loss_type]
    options = {"label_smoothing": objective.label_smoothing} if kind.smoothed else {}

    def term(sides: Sides) -> tuple[Weighted, Metrics]:
        return dpo_loss(
            kind,
            sides.policy,
            sides.reference,
            sides.lengths,
            sides.weights,
            beta=objective.beta,
            **options,
        )

    return term


def orpo_term(objective: Any) -> Term:
    """Returns the odds-ratio term; `objective.beta` is λ."""
    return lambda sides: odds_ratio_term(sides.averages, sides.weights, objective.beta)


def simpo_term(objective: Any) -> Term:
    """Returns the loss of pairs of SimPO."""
    return lambda sides: simpo_loss(
        sides.averages,
        sides.weights,
        beta=objective.beta,
        gamma=objective.gamma,
        label_smoothing=objective.label_smoothing,
    )


def cpo_pairs(objective: Any) -> Term:
    """Returns the loss of pairs of CPO."""
    return lambda sides: cpo_term(
        sides.policy,
        sides.weights,
        beta=objective.beta,
        label_smoothing=objective.label_smoothing,
    )


def likelihood_term(sides: Sides) -> tuple[Weighted, Metrics]:
    """Returns the NLL a token of the chosen sides, and which side a model without reference likes.

    `accuracy` and `margin` are of the log-probabilities of whole completions, `accuracy_per_token`
    and `margin_per_token` of their means over tokens.
    """
    loss = weighted(-sides.averages.chosen, sides.weights * sides.lengths.chosen)
    metrics = {
        name: value
        for name, value in preference_metrics(sides.policy, sides.policy, sides.weights).items()
        if name not in ("rewards/chosen", "rewards/rejected")
    }
    gap = sides.averages.margin
    metrics["accuracy_per_token"] = weighted(gap > 0, sides.weights)
    metrics["margin_per_token"] = weighted(gap, sides.weights)
    return loss, metrics


def loss_at_start(objective: Any) -> float | None:
    """Returns the preference loss where policy and reference are one.

    Args:
        objective: a resolved section with the name dpo.
    """
    values = {"hinge": 1.0, "ipo": 1.0 / (4.0 * objective.beta**2)}
    return values.get(objective.loss_type, math.log(2.0))


def of_pairs(
    make_term: Callable[[Any], Term],
    *,
    at_start: Callable[[Any], float | None] | None = None,
) -> Objective:
    """Returns the Objective of a loss of pairs.

    Args:
        make_term: resolved `objective` section → the loss of pairs.
        at_start: of a loss with a reference: the section → the loss where both are one.
    """

    def make(config: Any, parts: Parts, rows: Rows, balance: float, keep: Keep | None) -> SumLoss:
        objective = config.objective
        return preference_loss(
            parts.config,
            parts.method,
            rows,
            make_term(objective),
            reference=reference_of(config, parts, rows) if at_start is not None else None,
            nll_weight=objective.nll_weight,
            balance=balance,
            keep=keep,
        )

    def trained(config: Any, parts: Parts, rows: Rows) -> SumLoss:
        keep = keep_of(config, parts, rows.shards)
        return make(config, parts, rows, config.objective.balance, keep)

    return Objective(
        trained=trained,
        held_out=lambda config, parts, rows: make(config, parts, rows, 0.0, None),
        term="preference",
        likelihood=False,
        at_start=at_start,
        head_tokens=targets_alone,
    )


DPO = of_pairs(dpo_term, at_start=loss_at_start)
ORPO = of_pairs(orpo_term)
SIMPO = of_pairs(simpo_term)
CPO = of_pairs(cpo_pairs)
