"""Direct preference optimization and its kin: losses of a pair's log-probability ratios.

A pair's ratios are log π(y|x) − log π_ref(y|x) of its sides, summed over the completion's tokens;
their difference is the pair's margin h. Rafailov et al. 2023, arXiv:2305.18290.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxtune.core.weighted import Weighted, weighted
from jaxtune.objectives.completions import Pair


def log_ratios(policy: Pair, reference: Pair) -> Pair:
    """Returns log π − log π_ref of each side, [B, P], from the completions' log-probabilities.

    The reference's have no gradient.
    """
    fixed = jax.lax.stop_gradient(reference)
    return Pair(policy.chosen - fixed.chosen, policy.rejected - fixed.rejected)


def per_token(values: Pair, lengths: Pair) -> Pair:
    """Returns each side's values [B, P] over its number of tokens [B, P]; 0 without tokens."""
    return Pair(*(v / jnp.maximum(n, 1.0) for v, n in zip(values, lengths, strict=True)))


def sigmoid(margin: jax.Array, beta: float, label_smoothing: float = 0.0) -> jax.Array:
    """Returns −(1 − ε) log σ(β h) − ε log σ(−β h), [...] float32.

    DPO (arXiv:2305.18290, eq. 7); with ε > 0 the conservative form for labels that are wrong with
    probability ε (Mitchell 2023, https://ericmitchell.ai/cdpo.pdf). On margins a token it is
    length-normalised DPO (Meng et al. 2024, arXiv:2405.14734, sec. 4.3; Tülu 3, arXiv:2411.15124).

    Args:
        margin: h, [...].
        beta: strength of the pull towards the reference, > 0.
        label_smoothing: ε in [0, 0.5).
    """
    x = beta * margin
    smooth = label_smoothing
    return -(1 - smooth) * jax.nn.log_sigmoid(x) - smooth * jax.nn.log_sigmoid(-x)


def robust(margin: jax.Array, beta: float, label_smoothing: float) -> jax.Array:
    """Returns [−(1 − ε) log σ(β h) + ε log σ(−β h)] / (1 − 2ε), [...] float32.

    Its mean over labels flipped with probability ε is the loss of the clean labels (Chowdhury et
    al. 2024, arXiv:2403.00409). Arguments as for `sigmoid`.
    """
    x = beta * margin
    smooth = label_smoothing
    clean = -(1 - smooth) * jax.nn.log_sigmoid(x) + smooth * jax.nn.log_sigmoid(-x)
    return clean / (1 - 2 * smooth)


def hinge(margin: jax.Array, beta: float) -> jax.Array:
    """Returns max(0, 1 − β h), [...].

    SLiC (Zhao et al. 2023, arXiv:2305.10425) in the form of RSO (Liu et al. 2023,
    arXiv:2309.06657). Arguments as for `sigmoid`.
    """
    return jax.nn.relu(1.0 - beta * margin)


def ipo(margin: jax.Array, beta: float) -> jax.Array:
    """Returns (h − 1 / (2β))², [...] (Azar et al. 2023, arXiv:2310.12036, eq. 17, τ = β).

    Args:
        margin: h, [...], a token: the authors divide each side's ratio by its length.
        beta: τ > 0.
    """
    return jnp.square(margin - 1.0 / (2.0 * beta))


class PairLoss(NamedTuple):
    """A loss of margins.

    Attributes:
        loss: (margin [B, P], beta[, label_smoothing]) → [B, P].
        averaged: whether margins are those of ratios a token.
        smoothed: whether it takes `label_smoothing`.
    """

    loss: Callable[..., jax.Array]
    averaged: bool = False
    smoothed: bool = False


LOSSES: dict[str, PairLoss] = {
    "sigmoid": PairLoss(sigmoid, smoothed=True),
    "sigmoid_norm": PairLoss(sigmoid, averaged=True, smoothed=True),
    "robust": PairLoss(robust, smoothed=True),
    "hinge": PairLoss(hinge),
    "ipo": PairLoss(ipo, averaged=True),
}


def dpo_loss(
    kind: PairLoss,
    policy: Pair,
    reference: Pair,
    lengths: Pair,
    weights: jax.Array,
    *,
    beta: float,
    **options: float,
) -> tuple[Weighted, dict[str, Weighted]]:
    """Returns (Σ weight · loss with Σ weight over pairs, metrics).

    At the start, where policy and reference are one, `sigmoid` is ln 2 and margins are 0.

    Args:
        kind: of `LOSSES`.
        policy, reference: log-probabilities of the completions, summed over tokens, each [B, P].
        lengths: tokens of the completions, each [B, P].
        weights: float32 [B, P]; see `completions.pair_weights`.
        beta: of the loss and the rewards.
        options: `label_smoothing` where the kind takes it.
    """
    ratios = log_ratios(policy, reference)
    margin = per_token(ratios, lengths).margin if kind.averaged else ratios.margin
    loss = weighted(kind.loss(margin, beta, **options), weights)
    rewards = Pair(beta * ratios.chosen, beta * ratios.rejected)
    return loss, preference_metrics(rewards, policy, weights)


def preference_metrics(rewards: Pair, policy: Pair, weights: jax.Array) -> dict[str, Weighted]:
    """Returns what is logged of pairs.

    `rewards/chosen`, `rewards/rejected`, `rewards/margin`, `rewards/accuracy` (the share of pairs
    whose chosen reward is larger; equal ones count as wrong), `logps/chosen`, `logps/rejected`.

    Args:
        rewards: implicit rewards of the sides, each [B, P].
        policy: log-probabilities of the sides, each [B, P].
        weights: float32 [B, P].
    """
    return {
        "rewards/chosen": weighted(rewards.chosen, weights),
        "rewards/rejected": weighted(rewards.rejected, weights),
        "rewards/margin": weighted(rewards.margin, weights),
        "rewards/accuracy": weighted(rewards.margin > 0, weights),
        "logps/chosen": weighted(policy.chosen, weights),
        "logps/rejected": weighted(policy.rejected, weights),
    }


def nll_term(logprobs: jax.Array, tokens: jax.Array, coefficient: float) -> Weighted:
    """Returns coefficient · Σ −log p with the number of tokens: the second term of a loss.

    Keeps the chosen completions likely (RPO, Pang et al. 2024, arXiv:2404.19733, there with each
    completion's own mean; here a mean over tokens, as everywhere else); CPO's behaviour cloning,
    arXiv:2401.08417; ORPO's likelihood term, arXiv:2403.07691.

    Args:
        logprobs: float32 [B, T].
        tokens: float32 [B, T], which of them count; see `completions.chosen_tokens`.
        coefficient: of the term.
    """
    term = weighted(-logprobs, tokens)
    return Weighted(coefficient * term.sum, term.weight)
