"""Value functions for PPO: advantages, the value loss, and what keeps the policy near."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxtune.core.weighted import Weighted, weighted


def advantages_and_returns(
    rewards: jax.Array,
    values: jax.Array,
    completions: jax.Array,
    gamma: float = 1.0,
    lam: float = 0.95,
) -> tuple[jax.Array, jax.Array]:
    """Returns (advantages, returns), float32 [B, T], by generalised advantage estimation.

    δ_t = r_t + γ V_{t+1} − V_t and A_t = δ_t + γ λ A_{t+1} over the tokens of one completion, with
    V = A = 0 after its last; returns are A + V (Schulman et al. 2015, arXiv:1506.02438, eq. 16).
    Tokens outside of completions are passed over and have 0; those of one completion, which may
    have gaps, stand in the order in which they were sampled.

    Args:
        rewards: float32 [B, T], of each token.
        values: float32 [B, T], V at the state in which the token was chosen.
        completions: int32 [B, T], 0 for none.
        gamma: discount, γ.
        lam: λ; 1 gives Monte Carlo returns less the value.
    """

    def back(later: tuple, now: tuple) -> tuple[tuple, jax.Array]:
        next_value, next_advantage, next_completion = later
        reward, value, completion = now
        goes_on = (completion == next_completion).astype(jnp.float32)
        delta = reward + gamma * next_value * goes_on - value
        advantage = delta + gamma * lam * next_advantage * goes_on
        inside = completion > 0
        kept = tuple(
            jnp.where(inside, new, old)
            for new, old in zip((value, advantage, completion), later, strict=True)
        )
        return kept, jnp.where(inside, advantage, 0.0)

    rewards, values = (x.astype(jnp.float32) for x in (rewards, values))
    none = jnp.zeros_like(rewards[:, 0])
    start = (none, none, jnp.zeros_like(completions[:, 0]))
    columns = (rewards.T, values.T, completions.T)
    _, advantages = jax.lax.scan(back, start, columns, reverse=True)
    advantages = advantages.T
    return advantages, jnp.where(completions > 0, advantages + values, 0.0)


def value_loss(
    values: jax.Array,
    old_values: jax.Array,
    returns: jax.Array,
    weights: jax.Array,
    clip: float | None,
) -> tuple[Weighted, dict[str, Weighted]]:
    """Returns (Σ max((V − R)², (V′ − R)²) / 2 with the number of tokens, metrics).

    V′ is V held within `clip` of the old value (Schulman et al. 2017, as in the authors' code;
    Huang et al. 2022, "The 37 implementation details of PPO", no. 9).

    Args:
        values, old_values, returns, weights: float32 [B, T].
        clip: > 0, in units of the value; None for the plain squared error.

    Metrics: `value/clip_share`, `value/mean`, `value/error` (mean squared error).
    """
    returns, old_values = jax.lax.stop_gradient((returns, old_values))
    squares = plain = jnp.square(values - returns)
    if clip is not None:
        held = jnp.clip(values, old_values - clip, old_values + clip)
        squares = jnp.maximum(plain, jnp.square(held - returns))
    metrics = {
        "value/clip_share": weighted(squares > plain, weights),
        "value/mean": weighted(values, weights),
        "value/error": weighted(plain, weights),
    }
    return weighted(squares / 2, weights), metrics


def whiten(values: jax.Array, weights: jax.Array, *, centred: bool = True) -> jax.Array:
    """Returns float32 [B, T] with variance 1 (and mean 0, if centred) over weight > 0; 0 elsewhere.

    To be taken once over all the rollouts of an iteration: of a part it would be another number.

    Args:
        values: [B, T].
        weights: [B, T], of which only whether they are 0 counts.
        centred: whether the mean is taken away (advantages) or kept (rewards).
    """
    inside = weights > 0
    number = jnp.maximum(jnp.sum(inside), 1)
    values = jnp.where(inside, values.astype(jnp.float32), 0.0)
    mean = jnp.sum(values) / number
    square = jnp.sum(jnp.where(inside, jnp.square(values - mean), 0.0))
    scaled = (values - mean) * jax.lax.rsqrt(square / jnp.maximum(number - 1, 1) + 1e-8)
    return jnp.where(inside, scaled if centred else scaled + mean, 0.0)


def adapted_kl(coefficient: float, measured: float, target: float, gain: float) -> float:
    """Returns the KL coefficient for the next iteration: β (1 + gain · e).

    e is the relative error of the measured KL, held within ±0.2 (Ziegler et al. 2019,
    arXiv:1909.08593, sec. 2.2, gain 0.1; in the authors' code gain is episodes / horizon).

    >>> round(adapted_kl(0.1, measured=12.0, target=6.0, gain=0.1), 6)
    0.102

    Args:
        coefficient: β of this iteration.
        measured: KL of this iteration, nats a completion (or a token, as the target is).
        target: wanted KL, > 0.
        gain: of the proportional control.
    """
    error = min(max(measured / target - 1.0, -0.2), 0.2)
    return coefficient * (1.0 + gain * error)
