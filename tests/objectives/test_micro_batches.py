"""C1, C24: an objective's loss and gradient do not depend on how its rows are divided.

https://github.com/huggingface/trl/issues/2175, https://github.com/huggingface/trl/issues/6439.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune.core.weighted import weighted
from jaxtune.objectives import completions as c
from jaxtune.objectives import distill, dpo, kl, policy, reward, simpo, value
from jaxtune.objectives.cpo import cpo_term
from jaxtune.objectives.kto import kto_loss
from jaxtune.objectives.orpo import odds_ratio_term
from jaxtune.training.step import mean_loss, summed_gradients, unit_weight

ROWS, TOKENS, COUNT = 8, 10, 4
RNG = np.random.default_rng(0)


def ragged() -> np.ndarray:
    """Completions of very different lengths; a row without any, and one with half a pair."""
    own = np.zeros((ROWS, TOKENS), np.int32)
    for row, sizes in enumerate(
        [(1, 1), (4, 5), (2, 3, 1, 2), (), (6, 1), (1, 2, 1, 1), (3,), (1, 1, 1, 6)]
    ):
        ids = np.repeat(np.arange(1, len(sizes) + 1), sizes)
        own[row, TOKENS - len(ids) :] = ids
    return own


OWN = ragged()
BATCH = {
    "row": np.arange(ROWS, dtype=np.int32)[:, None],
    "completions": OWN,
    "mask": (OWN > 0).astype(np.float32),
    "positions": np.broadcast_to(np.arange(TOKENS, dtype=np.int32), OWN.shape),
    "reference": RNG.uniform(-3, -0.1, OWN.shape).astype(np.float32),
    "old": RNG.uniform(-3, -0.1, OWN.shape).astype(np.float32),
    "advantages": RNG.standard_normal(OWN.shape).astype(np.float32),
    "returns": RNG.standard_normal(OWN.shape).astype(np.float32),
    "label": (OWN % 3 == 1).astype(np.float32),
    "example_weight": (1.0 + OWN // 3 + np.arange(ROWS)[:, None] % 2).astype(np.float32),
    "teacher": RNG.standard_normal((*OWN.shape, 3)).astype(np.float32),
}
PARAMS = {"values": RNG.uniform(-3, -0.1, (ROWS, TOKENS)).astype(np.float32)}


def sides(batch, values):
    return c.pairs(c.totals(values, batch["completions"], COUNT))


def weights(batch):
    return c.pair_weights(batch["completions"], COUNT, batch["example_weight"])


def means(batch, values):
    return c.pairs(c.averages(values, batch["completions"], COUNT))


def preference(kind, batch, values, **options):
    sizes = c.pairs(c.lengths(batch["completions"], COUNT))
    reference = sides(batch, batch["reference"])
    return dpo.dpo_loss(
        dpo.LOSSES[kind], sides(batch, values), reference, sizes, weights(batch), **options
    )


def nll(batch, values):
    return dpo.nll_term(values, c.chosen_tokens(batch["completions"]), 0.5)


def rpo(batch, values):
    loss, metrics = preference("sigmoid", batch, values, beta=0.1)
    return {"dpo": loss, "nll": nll(batch, values)}, metrics


def orpo(batch, values):
    term, metrics = odds_ratio_term(means(batch, values), weights(batch), 0.3)
    return {"nll": nll(batch, values), "odds_ratio": term}, metrics


def cpo(batch, values):
    term, metrics = cpo_term(sides(batch, values), weights(batch), beta=0.1)
    return {"cpo": term, "nll": nll(batch, values)}, metrics


def kto(batch, values):
    own = batch["completions"]
    ratios = c.totals(values - batch["reference"], own, COUNT)
    label = c.of_completion(batch["label"], own, COUNT)
    weight = c.of_completion(batch["example_weight"], own, COUNT)
    return kto_loss(ratios, label, weight, 0.4, beta=0.2, undesirable_weight=0.8)


def rewards(batch, values):
    scores = c.at_last(values, batch["completions"], batch["positions"], COUNT)
    return reward.reward_loss(c.pairs(scores), weights(batch), margin=0.3, center=0.1)


def ranked(batch, values):
    own = batch["completions"]
    scores = c.at_last(values, own, batch["positions"], COUNT)
    lists = c.present(own, COUNT).astype(jnp.int32)
    ranks = jnp.broadcast_to(jnp.arange(COUNT), scores.shape)
    return reward.ranked_loss(scores, lists, ranks, jnp.ones(scores.shape))


def steps(batch, values):
    return reward.step_loss(values, batch["label"], batch["mask"])


def on_line(normaliser, ratio, batch, values):
    found = ratio(batch, values)
    losses = policy.clipped(found, batch["advantages"], 0.2, 0.3, 3.0)
    losses = losses + 0.1 * kl.k3(values, batch["reference"])
    bonus = policy.entropy_term(values**2, batch["mask"], 0.01)
    metrics = policy.policy_metrics(found, batch["advantages"], batch["mask"], 0.2, 0.3)
    return {"policy": normaliser(batch, losses), "entropy": bonus}, metrics


def token_ratio(batch, values):
    return policy.token_log_ratio(values, batch["old"])


def sequence_ratio(batch, values):
    return policy.mean_log_ratio(values, batch["old"], batch["completions"], COUNT)


def total_ratio(batch, values):
    # A completion's ratio is a product: near 1 only if the tokens' are.
    old = values + 0.1 * (batch["old"] - values)
    return policy.total_log_ratio(values, old, batch["completions"], COUNT)


NORMALISERS = {
    "token": lambda b, x: policy.by_token(x, b["mask"]),
    "sequence": lambda b, x: policy.by_sequence(x, b["mask"], b["completions"], COUNT),
    "constant": lambda b, x: policy.by_constant(x, b["mask"], b["completions"], COUNT, TOKENS),
}


def values_of(batch, values):
    return value.value_loss(values, batch["old"], batch["returns"], batch["mask"], 0.2)


def teacher(batch, values):
    logits = values[..., None] * jnp.array([1.0, -0.5, 0.2])
    found = distill.jsd(0.3)(logits, batch["teacher"])
    return distill.distillation_loss(found, batch["mask"]), {}


OBJECTIVES = {
    **{
        kind: functools.partial(preference, kind, beta=0.1)
        for kind in ("sigmoid", "sigmoid_norm", "hinge", "ipo")
    },
    "robust": functools.partial(preference, "robust", beta=0.1, label_smoothing=0.1),
    "rpo": rpo,
    "kto": kto,
    "orpo": orpo,
    "simpo": lambda b, x: simpo.simpo_loss(means(b, x), weights(b), beta=2.0, gamma=0.5),
    "cpo": cpo,
    "reward": rewards,
    "ranked": ranked,
    "steps": steps,
    **{f"grpo_{k}": functools.partial(on_line, v, token_ratio) for k, v in NORMALISERS.items()},
    "gspo": functools.partial(on_line, NORMALISERS["sequence"], sequence_ratio),
    "rloo": functools.partial(on_line, NORMALISERS["sequence"], total_ratio),
    "value": values_of,
    "distill": teacher,
}


@functools.cache
def program(name: str, count: int):
    """(params, batch) → (loss, metrics, gradient) as the training step takes them, jitted."""

    def sum_loss(trainable, frozen, batch, key):
        return OBJECTIVES[name](batch, trainable["values"][batch["row"][:, 0]])

    def run(params, batch):
        losses, metrics, grads = summed_gradients(
            sum_loss, params, {}, batch, jax.random.key(0), count
        )
        weight = unit_weight(losses)
        return (
            mean_loss(losses),
            {k: v.mean() for k, v in metrics.items()},
            grads["values"] / weight,
        )

    return jax.jit(run)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_micro_batches_give_the_whole_batchs_loss_and_gradient(name):
    whole = program(name, 1)(PARAMS, BATCH)
    assert np.abs(whole[2]).max() > 1e-4
    order = np.random.default_rng(1).permutation(ROWS)
    for rows in (slice(None), order):
        parts = program(name, 4)(PARAMS, {key: array[rows] for key, array in BATCH.items()})
        for a, b in zip(jax.tree.leaves(parts), jax.tree.leaves(whole), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_batch_without_completions_gives_nothing(name):
    """C33: 0/0 on a batch without targets."""
    zero = {"completions": 0, "mask": 0}
    batch = {k: (v * zero.get(k, 1)).astype(v.dtype) for k, v in BATCH.items()}
    loss, metrics, grad = program(name, 1)(PARAMS, batch)
    assert loss == 0 and not np.any(grad)
    assert not any(map(float, metrics.values()))


def test_normalisers_against_loops():
    """C24: what each normaliser divides by, https://github.com/huggingface/trl/issues/2881."""
    losses = RNG.standard_normal(OWN.shape).astype(np.float32)
    own = [losses[r][OWN[r] == n] for r in range(ROWS) for n in range(1, COUNT + 1)]
    own = [tokens for tokens in own if len(tokens)]
    wanted = {
        "token": sum(x.sum() for x in own) / sum(map(len, own)),
        "sequence": np.mean([x.mean() for x in own]),
        "constant": sum(x.sum() for x in own) / (len(own) * TOKENS),
    }
    for name, normaliser in NORMALISERS.items():
        found = normaliser(BATCH, jnp.asarray(losses)).mean()
        np.testing.assert_allclose(found, wanted[name], rtol=1e-5)


def of_token(logprobs, old_logprobs, completions, count):
    """GSPO-token (arXiv:2507.18071, eq. 14): `mean_log_ratio`, with the token's own gradient."""
    ratio = policy.mean_log_ratio(logprobs, old_logprobs, completions, count)
    return jax.lax.stop_gradient(ratio) + logprobs - jax.lax.stop_gradient(logprobs)


def test_the_ratio_of_a_sequence_spreads_its_gradient():
    """GSPO's two forms have one gradient where advantages are equal within a completion."""
    advantages = c.spread(c.averages(jnp.asarray(BATCH["advantages"]), OWN, COUNT), OWN)

    def loss(ratio, values):
        found = ratio(values, BATCH["old"], OWN, COUNT)
        return NORMALISERS["sequence"](BATCH, policy.clipped(found, advantages, 9.0, 9.0)).mean()

    ours, theirs = (
        jax.value_and_grad(functools.partial(loss, ratio))(PARAMS["values"])
        for ratio in (policy.mean_log_ratio, of_token)
    )
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


def test_a_masked_completion_counts_or_not_as_asked():
    """Weight 0 keeps it in the number of completions; without an id it is not there."""
    losses = jnp.ones(OWN.shape)
    cut = np.where(np.arange(ROWS)[:, None] == 1, 0, BATCH["mask"])
    number = float(c.present(OWN, COUNT).sum())
    assert policy.by_sequence(losses, cut, OWN, COUNT).weight == number
    left = np.where(np.arange(ROWS)[:, None] == 1, 0, OWN)
    found = policy.by_sequence(losses, BATCH["mask"], left, COUNT)
    assert found.weight == number - 2 and found.mean() == 1.0


def test_an_accident_of_a_ratio_does_not_overflow():
    ratio = jnp.array([200.0, -200.0, 200.0])
    gain = jnp.array([1.0, 1.0, -1.0])

    def loss(ratio):
        return weighted(policy.clipped(ratio, gain, 0.2, 0.2), jnp.ones(3)).sum

    found, grad = jax.value_and_grad(loss)(ratio)
    assert np.isfinite(found) and np.all(np.isfinite(grad))
