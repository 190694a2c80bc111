"""C30: log-probabilities in chunks equal the plain ones, in value and gradient."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune.core.weighted import weighted
from jaxtune.objectives.logprobs import plain_scores, shift, token_scores
from jaxtune.objectives.sft import next_token_loss

B, T, D = 2, 13, 6


def arrays(vocab: int, dtype: str, seed: int = 0):
    rng = np.random.default_rng(seed)
    hidden = rng.standard_normal((B, T, D)).astype(dtype)
    kernel = (3 * rng.standard_normal((D, vocab))).astype(dtype)
    targets = rng.integers(0, vocab, (B, T)).astype(np.int32)
    weights = np.float32(rng.random((B, T)) < 0.6)
    return hidden, kernel, targets, weights


def by_hand(hidden, kernel, targets):
    """Log-probabilities and their gradients, in float64 numpy, one token at a time."""
    hidden, kernel = hidden.astype(np.float64), kernel.astype(np.float64)
    values, d_hidden, d_kernel = np.zeros((B, T)), np.zeros_like(hidden), np.zeros_like(kernel)
    hits = np.zeros((B, T), bool)
    for b in range(B):
        for t in range(T):
            logits = hidden[b, t] @ kernel
            p = np.exp(logits - logits.max())
            p /= p.sum()
            values[b, t] = np.log(p[targets[b, t]])
            hits[b, t] = logits.argmax() == targets[b, t]
            delta = -p
            delta[targets[b, t]] += 1
            d_hidden[b, t] = kernel @ delta
            d_kernel += np.outer(hidden[b, t], delta)
    return values, hits, d_hidden, d_kernel


def chunked(hidden, kernel, targets, chunk):
    vocab = kernel.shape[1]
    limit = chunk * B * vocab * 4
    return token_scores(lambda h: h @ kernel, hidden, targets, vocab, logits_bytes=limit)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
# 4, 5 and 12 do not divide the 13 tokens; 100 is more than there are
@pytest.mark.parametrize(("vocab", "chunk"), [(11, 1), (11, 4), (11, 12), (64, 5), (64, 100)])
def test_chunks_equal_the_plain_form_and_the_formula(dtype, vocab, chunk):
    """A wrong gradient in chunks: https://github.com/AI-Hypercomputer/maxtext/issues/4959."""
    with jax.enable_x64(dtype == "float64"):
        hidden, kernel, targets, _ = arrays(vocab, dtype)

        def total(hidden, kernel):
            scores = chunked(hidden, kernel, targets, chunk)
            return jnp.sum(scores.logprobs), scores

        run = jax.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))
        (_, scores), grads = run(hidden, kernel)
        plain = plain_scores(jnp.asarray(hidden) @ kernel, targets)
        assert scores.logprobs.dtype == dtype
    values, hits, *expected = by_hand(hidden, kernel, targets)
    tolerance = 1e-5 if dtype == "float32" else 1e-12
    for found in (scores, plain):
        np.testing.assert_allclose(found.logprobs, values, rtol=tolerance, atol=tolerance)
        assert np.array_equal(found.correct, hits)
    for found, wanted in zip(grads, expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=10 * tolerance, atol=10 * tolerance)


@pytest.mark.parametrize("chunk", [4, 100])
def test_masked_rows_give_neither_loss_nor_gradient(chunk):
    """Not even where a hidden state that nobody asked for is not finite."""
    hidden, kernel, targets, weights = arrays(11, "float32")
    weights[0] = 0.0
    mad = hidden.copy()
    mad[0, 3] = 1e30  # its logits overflow

    def loss(hidden, kernel):
        return weighted(-chunked(hidden, kernel, targets, chunk).logprobs, weights).sum

    value, grads = jax.value_and_grad(loss, argnums=(0, 1))(hidden, kernel)
    assert np.all(np.isfinite(grads[1])) and not np.any(grads[0][0])
    one = weighted(-chunked(hidden, kernel, targets, chunk).logprobs[1], weights[1])
    np.testing.assert_allclose(value, one.sum, rtol=1e-6)
    np.testing.assert_allclose(loss(mad, kernel), value, rtol=1e-6)


@pytest.mark.parametrize("shards", [1, 2])
def test_the_chunk_counts_the_bytes_of_one_device(shards):
    hidden, kernel, targets, _ = arrays(11, "float32")
    seen = []

    def head(h):
        seen.append(h.shape[1])
        return h @ kernel

    token_scores(head, hidden, targets, 11, logits_bytes=4 * B * 11 * 4, shards=shards)
    assert max(seen) == {1: 4, 2: 7}[shards]  # 13 tokens in 4 chunks of 4, or 2 of 7


def test_targets_are_the_next_tokens_and_weights_move_with_them():
    rng = np.random.default_rng(0)
    batch = {
        "input_ids": jnp.asarray(rng.integers(0, 9, (3, 5))),
        "loss_mask": jnp.asarray(rng.random((3, 5)), jnp.float32),
    }
    targets, weights = shift(batch)
    for row in range(3):
        for t in range(4):
            assert targets[row, t] == batch["input_ids"][row, t + 1]
            assert weights[row, t] == batch["loss_mask"][row, t + 1]
    assert not np.any(weights[:, -1])


def test_the_next_token_loss_is_a_weighted_sum():
    hidden, kernel, targets, weights = arrays(11, "float32")
    scores = plain_scores(hidden @ kernel, targets)
    loss, metrics = next_token_loss(scores, weights)
    values, hits, *_ = by_hand(hidden, kernel, targets)
    np.testing.assert_allclose(loss.sum, -(values * weights).sum(), rtol=1e-5)
    assert loss.weight == metrics["accuracy"].weight == weights.sum()
    assert metrics["accuracy"].sum == (hits * weights).sum()
