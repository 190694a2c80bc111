"""Distillation: a student's distribution of each token drawn towards a teacher's.

Divergences take logits [..., V] of both (anything that `log_softmax` makes log-probabilities of)
and give nats, [...]; the teacher's have no gradient. Divide both by the temperature first. Hinton
et al. 2015, arXiv:1503.02531, multiply the loss by its square, so that gradients keep their size;
that factor is the caller's coefficient here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxtune.core.weighted import Weighted, weighted
from jaxtune.objectives.chunks import in_chunks
from jaxtune.objectives.kl import divergence, exact
from jaxtune.objectives.logprobs import Head

# The rest of a teacher's probability is the difference of 1 and a sum in float32: below this it is
# rounding, which may even be negative, and a student that has mass there must not pay without end.
LEAST_REST = 1e-6

Divergence = Callable[[jax.Array, jax.Array], jax.Array]


def log_distributions(student: jax.Array, teacher: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns log-probabilities [..., V] of both; the teacher's without a gradient."""
    fixed = jax.lax.stop_gradient(teacher)
    return jax.nn.log_softmax(student, axis=-1), jax.nn.log_softmax(fixed, axis=-1)


def forward_kl(student: jax.Array, teacher: jax.Array) -> jax.Array:
    """Returns KL(teacher‖student), [...]: the student covers all that the teacher does."""
    logs, logt = log_distributions(student, teacher)
    return divergence(logt, logs)


def reverse_kl(student: jax.Array, teacher: jax.Array) -> jax.Array:
    """Returns KL(student‖teacher), [...]: the student stays where the teacher is likely.

    Gu et al. 2023, arXiv:2306.08543.
    """
    return exact(student, teacher)


def generalised_jsd(student: jax.Array, teacher: jax.Array, beta: float) -> jax.Array:
    """Returns β KL(teacher‖m) + (1 − β) KL(student‖m), m = β teacher + (1 − β) student, [...].

    Agarwal et al. 2023, arXiv:2306.13649, eq. 1. β = 1/2 is the Jensen–Shannon divergence; towards
    0 and 1 it vanishes like β · forward and (1 − β) · reverse KL, which `jsd` gives at the ends.

    Args:
        student, teacher: logits [..., V].
        beta: in (0, 1), static.
    """
    logs, logt = log_distributions(student, teacher)
    logm = jnp.logaddexp(logs + jnp.log1p(-beta), logt + jnp.log(beta))
    return beta * divergence(logt, logm) + (1 - beta) * divergence(logs, logm)


def jsd(beta: float) -> Divergence:
    """Returns the generalised JSD(β) as GKD uses it: forward KL at β = 0, reverse KL at β = 1."""
    ends = {0.0: forward_kl, 1.0: reverse_kl}
    return ends.get(beta) or functools.partial(generalised_jsd, beta=beta)


def token_divergences(
    measure: Divergence,
    student: tuple[Head, jax.Array],
    teacher: tuple[Head, jax.Array],
    vocab_size: int,
    *,
    temperature: float = 1.0,
    **chunks: Any,
) -> jax.Array:
    """Returns the divergence float32 [B, T] of two models at each position, in chunks.

    Args:
        measure: of logits, such as `forward_kl` or `jsd(0.5)`.
        student, teacher: head and hidden [B, T, D] of each; their vocabulary is the same.
        vocab_size: V.
        temperature: divides the logits of both.
        chunks: as of `chunks.in_chunks`.
    """

    def piece(hidden: tuple[jax.Array, jax.Array]) -> jax.Array:
        logits = [
            head(h) / temperature for (head, _), h in zip((student, teacher), hidden, strict=True)
        ]
        return measure(*logits)

    states = (student[1], jax.lax.stop_gradient(teacher[1]))
    return in_chunks(piece, states, vocab_size, heads=2, **chunks)


def with_rest(logits: jax.Array, ids: jax.Array, teacher: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns log-probabilities (student's, teacher's) [..., K + 1]: the K tokens, and the rest.

    With K = V there is no rest, and they are [..., V].

    What the teacher's K most likely tokens leave over is one more event. A divergence of these is a
    lower bound on that of the whole distributions, and 0 only where the student gives the K tokens
    the teacher's probabilities; cutting the rest away and renormalising would let the student put
    any mass outside of them.

    Args:
        logits: the student's, float32 [..., V], at the temperature of the teacher's.
        ids: int32 [..., K], distinct.
        teacher: log-probabilities of `ids` in the teacher's whole distribution, [..., K]. They are
            of one temperature, which cannot be changed afterwards.
    """
    top = jnp.take_along_axis(logits, ids, axis=-1)
    if ids.shape[-1] == logits.shape[-1]:
        return jax.nn.log_softmax(top, axis=-1), teacher
    without = jnp.put_along_axis(logits, ids, -jnp.inf, axis=-1, inplace=False)
    rest = jax.nn.logsumexp(without, axis=-1, keepdims=True)
    student = jax.nn.log_softmax(jnp.concatenate([top, rest], axis=-1), axis=-1)
    known = jax.nn.logsumexp(teacher, axis=-1, keepdims=True)
    rest = jnp.log(jnp.maximum(-jnp.expm1(known), LEAST_REST))
    return student, jnp.concatenate([teacher, rest], axis=-1)


def top_k_divergences(
    measure: Divergence,
    student: tuple[Head, jax.Array],
    ids: jax.Array,
    teacher: jax.Array,
    vocab_size: int,
    *,
    temperature: float = 1.0,
    **chunks: Any,
) -> jax.Array:
    """Returns the divergence float32 [B, T] from stored top-k log-probabilities of a teacher.

    Args:
        measure: of logits, such as `forward_kl` or `jsd(0.5)`.
        student: head and hidden [B, T, D].
        ids: int32 [B, T, K], the teacher's most likely tokens at each position.
        teacher: float32 [B, T, K], their log-probabilities at the same temperature; see
            `with_rest`.
        vocab_size: V.
        temperature: divides the student's logits.
        chunks: as of `chunks.in_chunks`.
    """
    head, hidden = student

    def piece(x: tuple) -> jax.Array:
        return measure(*with_rest(head(x[0]) / temperature, x[1], x[2]))

    return in_chunks(piece, (hidden, ids, teacher), vocab_size, **chunks)


def distillation_loss(
    divergences: jax.Array, weights: jax.Array, coefficient: float = 1.0
) -> Weighted:
    """Returns coefficient · Σ divergences with the weight of the tokens.

    Args:
        divergences: float32 [B, T], of the prediction at each position.
        weights: float32 [B, T], of the targets at the same positions.
        coefficient: of the term.
    """
    term = weighted(divergences, weights)
    return Weighted(coefficient * term.sum, term.weight)
