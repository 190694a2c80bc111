"""Losses, metrics and gradients equal TRL's on the same arrays (tests/goldens/*_losses.py)."""

from __future__ import annotations

import importlib.util
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune.core.weighted import Weighted
from jaxtune.objectives import advantages, distill, dpo, kl, policy, reward, simpo, value
from jaxtune.objectives.completions import (
    Pair,
    averages,
    chosen_tokens,
    lengths,
    pair_weights,
    pairs,
    totals,
)
from jaxtune.objectives.cpo import cpo_term
from jaxtune.objectives.kto import kto_loss, reference_point
from jaxtune.objectives.logprobs import plain_scores
from jaxtune.objectives.orpo import odds_ratio_term
from tests.goldens import ppo_losses, preference_losses
from tests.goldens.preference_losses import CPO, DPO, GKD, GRPO, KTO, OVERLONG, PAIRS, PLAIN, REWARD

FILE = json.loads(preference_losses.FILE.read_text())
GOLDEN = FILE["outcomes"]
GIVEN = {
    name: np.asarray(rows, np.int32 if name == "ids" else np.float32)
    for name, rows in FILE["inputs"].items()
}
PPO_FILE = json.loads(ppo_losses.FILE.read_text())
PPO = {name: np.asarray(rows, np.float32) for name, rows in PPO_FILE["inputs"].items()}

# TRL's names for what we call otherwise.
NAMES = {
    "rewards/margin": "rewards/margins",
    "rewards/accuracy": "rewards/accuracies",
    "rewards/desirable": "rewards/chosen",
    "rewards/undesirable": "rewards/rejected",
    "clip_share": "clip_ratio/region_mean",
    "clip_share/low": "clip_ratio/low_mean",
    "clip_share/high": "clip_ratio/high_mean",
}


def lay(rows, per_row: int):
    """[2P, T], all chosen before all rejected → [P / per_row, per_row · 2T], side by side."""
    sides = jnp.stack([rows[:PAIRS], rows[PAIRS:]], axis=1)
    return sides.reshape(PAIRS // per_row, -1, *rows.shape[2:])


def completions(per_row: int):
    """int32 of the tokens of `lay`."""
    number = np.arange(1, 2 * per_row + 1).reshape(1, per_row, 2, 1)
    mask = np.stack([GIVEN["mask"][:PAIRS], GIVEN["mask"][PAIRS:]], axis=1)
    mask = mask.reshape(PAIRS // per_row, per_row, 2, -1)
    return jnp.asarray((mask * number).reshape(PAIRS // per_row, -1), jnp.int32)


def total(loss) -> jax.Array:
    terms = [loss] if isinstance(loss, Weighted) else list(loss.values())
    return sum(term.mean() for term in terms)


def check(name: str, leaf, function) -> int:
    """function(leaf) → (loss, metrics), against the golden loss, gradient and metrics.

    Returns how many metrics were compared: those that TRL has too.
    """

    def scalar(leaf):
        loss, metrics = function(leaf)
        return total(loss), {key: metric.mean() for key, metric in metrics.items()}

    (loss, metrics), grad = jax.jit(jax.value_and_grad(scalar, has_aux=True))(jnp.asarray(leaf))
    wanted = GOLDEN[name]
    np.testing.assert_allclose(loss, wanted["loss"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(grad, np.array(wanted["grad"]), rtol=1e-5, atol=1e-6)
    theirs = {key: wanted["metrics"].get(NAMES.get(key, key)) for key in metrics}
    theirs = {key: metric for key, metric in theirs.items() if metric is not None}
    for key, metric in theirs.items():
        np.testing.assert_allclose(metrics[key], metric, rtol=1e-5, atol=1e-6, err_msg=key)
    return len(theirs)


@pytest.mark.parametrize("per_row", [1, 5])
@pytest.mark.parametrize("name", ["conservative", *(name for name in DPO if name != "aot")])
def test_dpo(name, per_row):
    settings = dict(DPO["aot" if name == "conservative" else name])
    kind = dpo.LOSSES.get(name, dpo.LOSSES["sigmoid"])
    own, count = completions(per_row), 2 * per_row

    def loss(rows):
        policy = pairs(totals(lay(rows, per_row), own, count))
        reference = pairs(totals(lay(GIVEN["reference"], per_row), own, count))
        sizes, weights = pairs(lengths(own, count)), pair_weights(own, count)
        found, metrics = dpo.dpo_loss(kind, policy, reference, sizes, weights, **settings)
        if name == "sigmoid+sft":
            nll = dpo.nll_term(lay(rows, per_row), chosen_tokens(own), 0.6)
            return {"dpo": found, "nll": nll}, metrics
        return found, metrics

    assert check(f"dpo/{name}", GIVEN["policy"], loss) == (0 if name == "conservative" else 6)


@pytest.mark.parametrize("name", KTO)
def test_kto(name):
    settings = dict(KTO[name])
    own = jnp.asarray(GIVEN["mask"], jnp.int32)
    gap = (GIVEN["kl_policy"] - GIVEN["kl_reference"]).sum(1, keepdims=True)
    z0 = 0.0
    if settings.pop("loss_type") == "kto":
        z0 = reference_point(gap, jnp.ones_like(gap))

    def loss(rows):
        ratios = totals(rows, own, 1) - totals(GIVEN["reference"], own, 1)
        label = GIVEN["desirable"][:, None]
        return kto_loss(ratios, label, jnp.ones_like(ratios), z0, beta=0.3, **settings)

    assert check(f"kto/{name}", GIVEN["policy"], loss) == 3


@pytest.mark.parametrize("per_row", [1, 5])
@pytest.mark.parametrize("name", [*CPO, "orpo"])
def test_reference_free(name, per_row):
    own, count = completions(per_row), 2 * per_row
    ids = GIVEN["ids"]

    def loss(logits):
        rows = plain_scores(logits[:, :-1], ids[:, 1:]).logprobs
        logprobs, weights = lay(rows, per_row), pair_weights(own, count)
        means = pairs(averages(logprobs, own, count))
        if name == "simpo":
            return simpo.simpo_loss(means, weights, beta=2.0, gamma=0.6)
        if name == "orpo":
            # TRL's likelihood is of the whole chosen row, the prompt's second token included;
            # here the prompt is one token, so it is that of the completion.
            term, metrics = odds_ratio_term(means, weights, 0.4)
            return {"nll": dpo.nll_term(logprobs, chosen_tokens(own), 1.0), "or": term}, metrics
        sums = pairs(totals(logprobs, own, count))
        term, metrics = cpo_term(sums, weights, beta=0.3, label_smoothing=0.1)
        return {"cpo": term, "nll": dpo.nll_term(logprobs, chosen_tokens(own), 0.7)}, metrics

    assert check(name, GIVEN["logits"], loss) == 6


@pytest.mark.parametrize("name", REWARD)
def test_reward(name):
    settings = dict(REWARD[name])
    margin = GIVEN["margins"][:, None] if settings.pop("margin", False) else 0.0

    def loss(scores):
        sides = Pair(scores[:PAIRS, None], scores[PAIRS:, None])
        weights = jnp.ones((PAIRS, 1))
        found, metrics = reward.reward_loss(sides, weights, margin=margin, **settings)
        return found, {"accuracy": metrics["rewards/accuracy"]}

    assert check(f"reward/{name}", GIVEN["scores"], loss) == 1


@pytest.mark.parametrize("name", GRPO)
def test_grpo(name):
    settings = PLAIN | GRPO[name]
    own = jnp.asarray(GIVEN["mask"], jnp.int32)
    low, high = settings["epsilon_low"], settings["epsilon_high"]
    weight = GIVEN["advantages"][:, None]

    def loss(rows):
        ratio = policy.token_log_ratio(rows, GIVEN["old"])
        token_ratio = ratio
        if settings["level"] == "sequence":
            ratio = policy.mean_log_ratio(rows, GIVEN["old"], own, 1)
        losses = policy.clipped(ratio, weight, low, high, settings["delta"])
        if settings["beta"]:
            penalty = kl.k3(rows, GIVEN["reference"])
            if settings["corrected"]:
                penalty = kl.reweighted(penalty, token_ratio)
            losses = losses + settings["beta"] * penalty
        metrics = {}
        if settings["level"] == "token":
            metrics = policy.policy_metrics(ratio, weight, GIVEN["mask"], low, high)
        mask = GIVEN["mask"]
        match settings["loss_type"]:
            case "grpo":
                return policy.by_sequence(losses, mask, own, 1), metrics
            case "dr_grpo":
                length = preference_losses.MAX_LENGTH
                return policy.by_constant(losses, mask, own, 1, length), metrics
        return policy.by_token(losses, mask), metrics

    of_tokens = settings["level"] == "token"
    assert check(f"grpo/{name}", GIVEN["policy"], loss) == (3 if of_tokens else 0)


def test_rloo():
    own = jnp.asarray(GIVEN["mask"], jnp.int32)

    def loss(rows):
        ratio = policy.total_log_ratio(rows, GIVEN["old"], own, 1)
        losses = policy.clipped(ratio, GIVEN["advantages"][:, None], 0.2, 0.2)
        return policy.by_sequence(losses, GIVEN["mask"], own, 1), {}

    check("rloo", GIVEN["policy"], loss)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("group", advantages.group_normalised),
        ("none", advantages.group_centred),
        ("batch", advantages.group_centred_batch_scaled),
        ("rloo", advantages.leave_one_out),
        ("rloo_normalised", advantages.leave_one_out_normalised),
    ],
)
def test_advantages(theirs, ours):
    found = ours(GIVEN["rewards"])
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, GOLDEN[f"advantages/{theirs}"], rtol=1e-5, atol=1e-6)


def test_overlong_punishment():
    lengths = np.array(OVERLONG["lengths"])
    found = advantages.soft_overlong(lengths, OVERLONG["limit"], OVERLONG["cache"])
    np.testing.assert_allclose(found, GOLDEN["overlong"], rtol=1e-6)


@pytest.mark.parametrize("name", GKD)
def test_gkd(name):
    beta, temperature = GKD[name]
    teacher, mask = GIVEN["teacher_logits"][:, 1:], GIVEN["mask"]

    def loss(logits):
        measure = distill.jsd(beta)
        found = measure(logits[:, 1:] / temperature, teacher / temperature)
        return distill.distillation_loss(found, mask), {}

    check(f"gkd/{name}", GIVEN["logits"], loss)


def test_ppo():
    wanted, settings = PPO_FILE["outcomes"], ppo_losses.SETTINGS
    mask, own = PPO["mask"], PPO["mask"].astype(np.int32)
    near = {"rtol": 1e-5, "atol": 1e-6}
    penalties = np.asarray(kl.k1(PPO["old"], PPO["reference"]))
    np.testing.assert_allclose(penalties * mask, wanted["kl"], **near)
    rewards = advantages.token_rewards(PPO["scores"], penalties, mask, settings["kl_coef"])
    np.testing.assert_allclose(rewards, wanted["rewards"], **near)

    def estimate(rewards, own):
        gae = (settings["gamma"], settings["lam"])
        found, returns = value.advantages_and_returns(rewards, PPO["old_values"], own, *gae)
        return value.whiten(found, own), returns

    gain, returns = estimate(rewards, own)
    np.testing.assert_allclose(gain, wanted["advantages"], **near)
    np.testing.assert_allclose(returns, wanted["returns"], **near)
    whole = np.ones_like(own)
    whitened, _ = estimate(value.whiten(PPO["old"], whole, centred=False), whole)
    np.testing.assert_allclose(whitened, wanted["advantages_of_whitened"], **near)

    clip = settings["cliprange"]

    def policy_loss(logprobs):
        ratio = policy.token_log_ratio(logprobs, PPO["old"])
        losses = policy.clipped(ratio, gain, clip, clip)
        metrics = policy.policy_metrics(ratio, gain, mask, clip, clip)
        return policy.by_token(losses, mask).mean(), metrics["clip_share"].mean()

    (loss, share), grad = jax.value_and_grad(policy_loss, has_aux=True)(PPO["policy"])
    np.testing.assert_allclose(loss, wanted["policy_loss"], **near)
    np.testing.assert_allclose(grad, wanted["policy_grad"], **near)
    np.testing.assert_allclose(share, wanted["metrics"]["policy/clipfrac"], **near)

    def value_loss(values):
        loss, metrics = value.value_loss(
            values, PPO["old_values"], returns, mask, settings["cliprange_value"]
        )
        return settings["vf_coef"] * loss.mean(), metrics

    (loss, metrics), grad = jax.value_and_grad(value_loss, has_aux=True)(PPO["values"])
    np.testing.assert_allclose(loss, wanted["value_loss"], **near)
    np.testing.assert_allclose(grad, wanted["values_grad"], **near)
    for ours, theirs in (("clip_share", "clipfrac"), ("mean", "vpred"), ("error", "error")):
        found = metrics[f"value/{ours}"].mean()
        np.testing.assert_allclose(found, wanted["metrics"][f"val/{theirs}"], **near)


def test_adaptive_kl():
    settings = ppo_losses.CONTROLLER
    coefficient, gain = settings["start"], settings["steps"] / settings["horizon"]
    for measured, wanted in zip(settings["kls"], PPO_FILE["outcomes"]["coefficients"], strict=True):
        coefficient = value.adapted_kl(coefficient, measured, settings["target"], gain)
        assert coefficient == pytest.approx(wanted)


def test_the_goldens_are_of_these_inputs():
    np.testing.assert_equal(FILE["inputs"], preference_losses.inputs())
    assert PPO_FILE["inputs"] == ppo_losses.inputs()


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="needs trl")
def test_trl_still_gives_the_goldens():
    assert preference_losses.distance(preference_losses.outcomes(), GOLDEN) < 1e-9
