"""Divergences from a teacher: against float64, in chunks, and from stored top-k."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune.objectives import distill, kl
from jaxtune.objectives.logprobs import entropy, policy_scores

B, T, D, E, V = 2, 13, 6, 4, 11
RNG = np.random.default_rng(0)
HIDDEN = RNG.standard_normal((B, T, D)).astype(np.float32)
KERNEL = RNG.standard_normal((D, V)).astype(np.float32)
OTHER_HIDDEN = RNG.standard_normal((B, T, E)).astype(np.float32)
OTHER_KERNEL = RNG.standard_normal((E, V)).astype(np.float32)
TARGETS = RNG.integers(0, V, (B, T)).astype(np.int32)
TEMPERATURE = 1.3
# room for logits of so many tokens of each row; 100 is more than there are
CHUNKS = [5, 100]


def head(kernel):
    return lambda hidden: hidden @ kernel


def log_softmax(logits):
    x = np.float64(logits) / TEMPERATURE
    return (
        x
        - np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1, keepdims=True))
        - x.max(-1, keepdims=True)
    )


LOGS, LOGT = log_softmax(HIDDEN @ KERNEL), log_softmax(OTHER_HIDDEN @ OTHER_KERNEL)


def kl_by_hand(logp, logq):
    return (np.exp(logp) * (logp - logq)).sum(-1)


def jsd_by_hand(beta):
    logm = np.log(beta * np.exp(LOGT) + (1 - beta) * np.exp(LOGS))
    return beta * kl_by_hand(LOGT, logm) + (1 - beta) * kl_by_hand(LOGS, logm)


MEASURES = {
    "forward": (distill.forward_kl, kl_by_hand(LOGT, LOGS)),
    "reverse": (distill.reverse_kl, kl_by_hand(LOGS, LOGT)),
    "half": (distill.jsd(0.5), jsd_by_hand(0.5)),
    "tenth": (distill.jsd(0.1), jsd_by_hand(0.1)),
}


def whole(measure, kernel, hidden):
    return measure(hidden @ kernel / TEMPERATURE, OTHER_HIDDEN @ OTHER_KERNEL / TEMPERATURE)


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("name", MEASURES)
def test_chunks_equal_the_plain_form_and_the_formula(name, chunk):
    measure, wanted = MEASURES[name]

    def chunked(kernel, hidden):
        return distill.token_divergences(
            measure,
            (head(kernel), hidden),
            (head(OTHER_KERNEL), OTHER_HIDDEN),
            V,
            temperature=TEMPERATURE,
            logits_bytes=2 * chunk * B * V * 4,
        )

    def total(function, kernel, hidden):
        found = function(kernel, hidden)
        return jnp.sum(jnp.sin(found)), found

    both = []
    for function in (chunked, functools.partial(whole, measure)):
        run = jax.value_and_grad(functools.partial(total, function), (0, 1), has_aux=True)
        (_, found), grads = jax.jit(run)(KERNEL, HIDDEN)
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)
        both.append(grads)
    for ours, plain in zip(*both, strict=True):
        np.testing.assert_allclose(ours, plain, rtol=1e-5, atol=1e-5)


def test_the_jsd_tends_to_both_divergences():
    for beta, wanted in ((1e-6, "forward"), (1 - 1e-6, "reverse")):
        found = jsd_by_hand(beta) / min(beta, 1 - beta)
        np.testing.assert_allclose(found, MEASURES[wanted][1], rtol=1e-3)
    assert distill.jsd(0.0) is distill.forward_kl
    assert distill.jsd(1.0) is distill.reverse_kl


def top_k(k):
    ids = np.argsort(-LOGT, axis=-1)[..., :k].astype(np.int32)
    return ids, np.take_along_axis(LOGT, ids, -1).astype(np.float32)


@pytest.mark.parametrize(("name", "chunk"), [("forward", 5), ("reverse", 5), ("half", 100)])
def test_top_k_is_the_divergence_of_the_lumped_distributions(name, chunk):
    measure, _ = MEASURES[name]
    ids, teacher = top_k(3)

    def found(kernel):
        return distill.top_k_divergences(
            measure,
            (head(kernel), HIDDEN),
            ids,
            teacher,
            V,
            temperature=TEMPERATURE,
            logits_bytes=chunk * B * V * 4,
        )

    def lumped(logp, xp):
        top = xp.take_along_axis(xp.exp(logp), ids, -1)
        return xp.log(xp.concatenate([top, 1 - top.sum(-1, keepdims=True)], -1))

    def by_hand(kernel):
        """From log_softmax of the student's whole row, with the divergence above."""
        student = jax.nn.log_softmax(HIDDEN @ kernel / TEMPERATURE)
        return measure(lumped(student, jnp), jnp.float32(lumped(LOGT, np)))

    def total(function, kernel):
        values = function(kernel)
        return jnp.sum(values), values

    ours, plain = (
        jax.jit(jax.grad(functools.partial(total, function), has_aux=True))(KERNEL)
        for function in (found, by_hand)
    )
    for a, b in zip(ours, plain, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_top_k_of_all_tokens_is_the_whole_and_fewer_are_a_lower_bound():
    whole_kl = MEASURES["forward"][1]
    before = np.zeros_like(whole_kl)
    for k in (2, 7, V):
        student, teacher = distill.with_rest(HIDDEN @ KERNEL / TEMPERATURE, *top_k(k))
        found = np.asarray(distill.forward_kl(student, teacher))
        assert np.all(found >= before - 1e-5) and np.all(found <= whole_kl + 1e-5)
        before = found
    np.testing.assert_allclose(before, whole_kl, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("train_entropy", "chunk"), [(False, 5), (True, 5), (True, 100)])
def test_policy_scores(chunk, train_entropy):
    def scores(kernel, hidden):
        return policy_scores(
            head(kernel),
            hidden,
            TARGETS,
            V,
            temperature=TEMPERATURE,
            train_entropy=train_entropy,
            reference=(head(OTHER_KERNEL), OTHER_HIDDEN),
            logits_bytes=2 * chunk * B * V * 4,
        )

    found = jax.jit(scores)(KERNEL, HIDDEN)
    chosen = np.take_along_axis(LOGS, TARGETS[..., None], -1)[..., 0]
    np.testing.assert_allclose(found.logprobs, chosen, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found.entropy, -(np.exp(LOGS) * LOGS).sum(-1), rtol=1e-5)
    np.testing.assert_allclose(found.kl, MEASURES["reverse"][1], rtol=1e-5, atol=1e-6)

    def plain(kernel, hidden):
        logits = hidden @ kernel / TEMPERATURE
        logp = jnp.take_along_axis(jax.nn.log_softmax(logits), TARGETS[..., None], -1)[..., 0]
        exact = kl.exact(logits, OTHER_HIDDEN @ OTHER_KERNEL / TEMPERATURE)
        return logp, entropy(logits if train_entropy else jax.lax.stop_gradient(logits)), exact

    def total(function, kernel, hidden):
        logp, spread, exact = function(kernel, hidden)
        return jnp.sum(logp + 2 * spread + 3 * exact)

    ours, wanted = (
        jax.jit(jax.grad(functools.partial(total, function), (0, 1)))(KERNEL, HIDDEN)
        for function in (scores, plain)
    )
    for a, b in zip(ours, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    assert policy_scores(head(KERNEL), HIDDEN, TARGETS, V).kl is None


def test_a_token_that_is_ruled_out_has_no_part_in_the_entropy():
    logits = jnp.array([0.3, -jnp.inf, 1.0])
    value, grad = jax.value_and_grad(entropy)(logits)
    p = np.exp([0.3, 1.0]) / np.exp([0.3, 1.0]).sum()
    np.testing.assert_allclose(value, -(p * np.log(p)).sum(), rtol=1e-6)
    assert np.all(np.isfinite(grad)) and grad[1] == 0
