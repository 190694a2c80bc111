"""C23: each KL estimator, value and gradient, against the exact KL on an enumerated vocabulary.

Wrong signs and biased gradients: https://github.com/huggingface/trl/issues/4967,
https://github.com/huggingface/trl/issues/6503, https://github.com/volcengine/verl/issues/2953.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune.objectives import kl

V = 6
RNG = np.random.default_rng(0)
POLICY, REFERENCE, OLD = (1.5 * RNG.standard_normal((3, V))).astype(np.float32)


def logp(logits):
    return jax.nn.log_softmax(logits)


def exact_by_hand(p, q) -> float:
    p, q = (np.exp(x - np.log(np.exp(x).sum())) for x in (np.float64(p), np.float64(q)))
    return float(sum(a * np.log(a / b) for a, b in zip(p, q, strict=True)))


def forward(logits):
    """KL(p‖q), q the reference."""
    return kl.exact(logits, REFERENCE)


def backward(logits):
    """KL(q‖p)."""
    q = jnp.exp(logp(REFERENCE))
    return jnp.sum(q * (logp(REFERENCE) - logp(logits)))


def mean_over_samples(estimate, sampler):
    """The mean of an estimate of each token over all tokens that the sampler can draw.

    The draw has no gradient: that is how training sees it.
    """

    def mean(logits):
        weights = jax.lax.stop_gradient(jnp.exp(logp(sampler(logits))))
        return jnp.sum(weights * estimate(logp(logits)))

    return mean


def on_policy(estimator):
    return mean_over_samples(lambda lp: estimator(lp, logp(REFERENCE)), lambda logits: logits)


@pytest.mark.parametrize("name", ["k1", "k3"])
def test_the_value_is_unbiased(name):
    exact = exact_by_hand(POLICY, REFERENCE)
    np.testing.assert_allclose(forward(POLICY), exact, rtol=1e-5)
    for estimator in (kl.ESTIMATES[name], kl.LOSSES[name]):
        np.testing.assert_allclose(on_policy(estimator)(POLICY), exact, rtol=1e-5)


def test_k2_is_unbiased_to_second_order():
    near = REFERENCE + 1e-2 * (POLICY - REFERENCE)
    exact = exact_by_hand(near, REFERENCE)
    np.testing.assert_allclose(on_policy(kl.k2)(near), exact, rtol=2e-2)


def test_k3_is_never_negative_and_varies_less_than_k1():
    lp, lq = logp(POLICY), logp(REFERENCE)
    assert np.all(kl.k3(lp, lq) >= 0) and np.any(kl.k1(lp, lq) < 0)
    # Where the policies are near each other, as in training.
    near = logp(REFERENCE + 0.1 * (POLICY - REFERENCE))

    def spread(values):
        p = jnp.exp(near)
        return jnp.sum(p * values**2) - jnp.sum(p * values) ** 2

    assert spread(kl.k3(near, lq)) < 0.1 * spread(kl.k1(near, lq))


@pytest.mark.parametrize(
    ("estimator", "divergence"),
    [(kl.k1_loss, forward), (kl.k2, forward), (kl.k3, backward)],
)
def test_the_gradient_is_that_of_the_documented_divergence(estimator, divergence):
    found = jax.grad(on_policy(estimator))(POLICY)
    np.testing.assert_allclose(found, jax.grad(divergence)(POLICY), rtol=1e-4, atol=1e-6)
    assert np.abs(found).max() > 0.05


def test_k1_has_no_gradient_of_its_own():
    np.testing.assert_allclose(jax.grad(on_policy(kl.k1))(POLICY), np.zeros(V), atol=1e-6)


@pytest.mark.parametrize("sampler", ["the policy", "an older one"])
@pytest.mark.parametrize("name", ["k1", "k3"])
def test_reweighted_it_is_right_in_value_and_gradient_whoever_sampled(name, sampler):
    drawn = POLICY if sampler == "the policy" else OLD
    estimate = mean_over_samples(
        lambda lp: kl.reweighted(kl.ESTIMATES[name](lp, logp(REFERENCE)), lp - logp(drawn)),
        lambda _: drawn,
    )
    value, grad = jax.value_and_grad(estimate)(POLICY)
    np.testing.assert_allclose(value, exact_by_hand(POLICY, REFERENCE), rtol=1e-5)
    np.testing.assert_allclose(grad, jax.grad(forward)(POLICY), rtol=1e-4, atol=1e-6)


def test_a_penalty_in_the_reward_pulls_like_the_exact_divergence():
    """The policy gradient of a reward −k1, with any baseline, descends KL(p‖q)."""

    def surrogate(lp):
        reward = -jax.lax.stop_gradient(kl.k1(lp, logp(REFERENCE)))
        return -(reward - 0.7) * lp

    found = jax.grad(mean_over_samples(surrogate, lambda logits: logits))(POLICY)
    np.testing.assert_allclose(found, jax.grad(forward)(POLICY), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("estimator", [kl.k1, kl.k2, kl.k3, kl.k1_loss])
def test_nothing_passes_to_the_reference(estimator):
    lp, lq = logp(POLICY), logp(REFERENCE)
    assert not np.any(jax.grad(lambda q: jnp.sum(estimator(lp, q)))(lq))


def test_a_token_that_is_ruled_out_adds_nothing():
    barred = jnp.asarray(POLICY).at[2].set(-jnp.inf)
    value, grad = jax.value_and_grad(forward)(barred)
    rest = np.delete(np.arange(V), 2)
    p = np.float64(POLICY[rest])
    p = np.exp(p) / np.exp(p).sum()
    q = np.exp(np.float64(REFERENCE)) / np.exp(np.float64(REFERENCE)).sum()
    np.testing.assert_allclose(value, np.sum(p * np.log(p / q[rest])), rtol=1e-5)
    assert np.all(np.isfinite(grad)) and grad[2] == 0
