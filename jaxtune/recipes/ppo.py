"""PPO: a clipped policy gradient with advantages from a value head on the policy's own trunk."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jaxtune.core.tree import Tree
from jaxtune.core.weighted import Weighted
from jaxtune.data.batches import Batch
from jaxtune.objectives import value
from jaxtune.objectives.advantages import token_rewards
from jaxtune.recipes import online, online_told
from jaxtune.recipes.assemble import Parts
from jaxtune.recipes.grpo import check_exact, look, policy_terms
from jaxtune.recipes.objective import Objective
from jaxtune.recipes.online import Credit
from jaxtune.recipes.prompt_data import open_prompts
from jaxtune.recipes.rows import Rows
from jaxtune.training.step import Loss, SumLoss


def ppo_loss(config: Any, parts: Parts, rows: Rows) -> SumLoss:
    """Returns the loss of a batch of rollouts; see `training.step.SumLoss`.

    Raises:
        RequestError: see `grpo.check_exact`.
    """
    o = config.objective
    check_exact(config, parts)

    def sum_loss(
        trainable: Tree, frozen: Tree, batch: dict[str, jax.Array], key: jax.Array | None
    ) -> tuple[Loss, dict[str, Weighted]]:
        seen = look(config, parts, rows.shards, trainable, frozen, batch)
        terms, metrics = policy_terms(o, seen, "token", "token")
        batch = seen.batch
        error, told = value.value_loss(
            seen.values, batch["old_values"], batch["returns"], batch["loss_mask"], o.value_clip
        )
        terms["value"] = Weighted(o.value_coef * error.sum, error.weight)
        return terms, metrics | told

    return sum_loss


def credit(
    o: Any,
    rewards: np.ndarray,
    rows: Batch,
    seen: Mapping[str, np.ndarray],
    coefficient: float,
) -> Credit:
    """Returns advantages, returns and old values of an iteration; see `online.GiveCredit`."""
    mask, scores = rows["loss_mask"], np.nan_to_num(rewards.reshape(-1))
    charge = np.zeros(mask.shape, np.float32)
    if o.kl_coef and o.kl_in == "reward":
        charge = online.charged(o, seen)
    given, returns = value.advantages_and_returns(
        token_rewards(scores, charge, mask, coefficient),
        seen["values"],
        rows["completions"],
        o.discount,
        o.gae_lambda,
    )
    if o.whiten:
        given = value.whiten(given, mask)
    inside = mask > 0
    unexplained = np.asarray(returns - seen["values"])[inside]
    spread = np.asarray(returns)[inside].var() if inside.any() else 0.0
    told = {"explained_variance": float(1 - unexplained.var() / spread) if spread else 0.0}
    arrays = {"advantages": given, "returns": returns, "old_values": seen["values"]}
    return Credit({name: np.asarray(array) for name, array in arrays.items()}, told)


OBJECTIVE = Objective(
    trained=ppo_loss,
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
