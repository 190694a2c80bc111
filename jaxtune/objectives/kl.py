"""Kullback–Leibler divergence of a policy from a reference: estimators a token, and exactly.

With tokens sampled from the policy p, u = log p − log q of the sampled token (q the reference):

| name | value | its mean | mean of its gradient, tokens held fixed |
|---|---|---|---|
| k1 | u | KL(p‖q) | 0: of no use as a loss |
| k2 | u² / 2 | KL(p‖q) + O(u³) | ∇ KL(p‖q) |
| k3 | e^−u − 1 + u | KL(p‖q), less variance | ∇ KL(q‖p), the other direction |

(Schulman 2020, http://joschu.net/blog/kl-approx.html; the gradients: Tang and Munos 2025,
arXiv:2506.09477.) So as a *penalty in the reward* or a logged number take k1 or k3; as a *loss*
take k2, or k1 with the score-function gradient (`k1_loss`), which have the same gradient. GRPO's
loss has k3 (arXiv:2402.03300, eq. 4) and so pulls towards the reference along KL(q‖p). Tokens that
an older policy sampled make all of them biased; `reweighted` mends that for k1 and k3, in value and
in gradient, which is then that of KL(p‖q) for both.

The gradient is of the divergence at one prefix. What a token does to later prefixes is the business
of the reward, which is why RLHF puts the penalty there (Ouyang et al. 2022, arXiv:2203.02155).
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp


def k1(logprobs: jax.Array, ref_logprobs: jax.Array) -> jax.Array:
    """Returns log p − log q of the sampled tokens, [...]; no gradient passes to the reference."""
    return logprobs - jax.lax.stop_gradient(ref_logprobs)


def k2(logprobs: jax.Array, ref_logprobs: jax.Array) -> jax.Array:
    """Returns (log p − log q)² / 2, [...]: as a loss it has the gradient of KL(p‖q)."""
    return jnp.square(k1(logprobs, ref_logprobs)) / 2


def k3(logprobs: jax.Array, ref_logprobs: jax.Array) -> jax.Array:
    """Returns q/p − 1 − log(q/p) ≥ 0, [...]: as a loss it has the gradient of KL(q‖p)."""
    u = k1(logprobs, ref_logprobs)
    return jnp.expm1(-u) + u


def k1_loss(logprobs: jax.Array, ref_logprobs: jax.Array) -> jax.Array:
    """Returns the value of k1 with the score-function gradient u ∇log p, that of KL(p‖q), [...]."""
    u = jax.lax.stop_gradient(k1(logprobs, ref_logprobs))
    return u + u * (logprobs - jax.lax.stop_gradient(logprobs))


def reweighted(estimates: jax.Array, log_ratio: jax.Array) -> jax.Array:
    """Returns p / p_old · estimates, [...]: unbiased, value and gradient, on tokens of p_old.

    The gradient passes through the ratio too, so this is right on tokens of the policy itself as
    well, where the ratio is 1 (DeepSeek-V3.2, arXiv:2512.02556).

    Args:
        estimates: k1 or k3, with their gradient; [...].
        log_ratio: log p − log p_old of the tokens, [...], with its gradient (0 in value where the
            policy has not moved since).
    """
    return jnp.exp(log_ratio) * estimates


def divergence(logp: jax.Array, logq: jax.Array) -> jax.Array:
    """Returns Σ p (log p − log q) [...] of log-probabilities [..., V]; 0 · log 0 is 0."""
    inside = logp > -jnp.inf
    gap = jnp.where(inside, logp, 0.0) - jnp.where(inside, logq, 0.0)
    return jnp.sum(jnp.where(inside, jnp.exp(logp) * gap, 0.0), axis=-1)


def exact(logits: jax.Array, ref_logits: jax.Array) -> jax.Array:
    """Returns KL(p‖q) [...] of logits [..., V] and ref_logits [..., V], value and gradient exact.

    The reference's have no gradient. In chunks over tokens: `logprobs.policy_scores`.
    """
    logp = jax.nn.log_softmax(logits, axis=-1)
    logq = jax.lax.stop_gradient(jax.nn.log_softmax(ref_logits, axis=-1))
    return divergence(logp, logq)


# (log-probabilities, the reference's) → estimates; values for rewards and logs
ESTIMATES: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {"k1": k1, "k2": k2, "k3": k3}
# … and what to add to a loss
LOSSES: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "k1": k1_loss,
    "k2": k2,
    "k3": k3,
}
