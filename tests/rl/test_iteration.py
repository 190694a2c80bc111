"""An iteration of GRPO from weights to batch, against full passes and sums written out by hand."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from jaxtune.core.tree import combine, map_paths
from jaxtune.models import decoder
from jaxtune.objectives.advantages import ADVANTAGES, soft_overlong
from jaxtune.recipes.build import build
from jaxtune.recipes.schema.resolve import resolve
from jaxtune.recipes.train import begin
from jaxtune.rl.rollouts import Schedule
from tests.rl.tiny import NEW, letters, run_config

pytestmark = pytest.mark.slow

COEF, OVERLONG, HEAT, EOS, ROWS = 0.3, 6, 0.8, 2, 16


@pytest.fixture(scope="module")
def iteration(tmp_path_factory):
    """(plan, policy, reference, batch in the order of prompts, what is told of it)."""
    directory = tmp_path_factory.mktemp("iteration")
    config = run_config(
        directory,
        objective__kl_coef=COEF,
        objective__kl_in="reward",
        objective__kl_estimator="exact",
        objective__overlong=OVERLONG,
        objective__mask_truncated=True,
        objective__temperature=HEAT,
        objective__epochs=1,
        batch_size=ROWS,
        data__eval=[],
        eval={},
    )
    plan = build(resolve(config))
    with jax.set_mesh(plan.mesh):
        begun = begin(plan, directory / "run", allow_change=False)
        keys = iter(jax.random.split(jax.random.key(1), 100))
        moved = map_paths(
            lambda path, leaf: leaf + 0.3 * jax.random.normal(next(keys), leaf.shape),
            begun.state.trainable,
        )
        state = dataclasses.replace(begun.state, trainable=moved)
        source = plan.objective.open_feed(plan, begun, lambda _: None)
        batch, told = source.feed(state)
    order = np.argsort(Schedule(ROWS, ROWS, 1, config["seed"]).rows_at(0, 0))
    batch = {name: array[order] for name, array in batch.items()}
    return plan, combine(moved, begun.frozen), combine(begun.start, begun.frozen), batch, told


def table(plan, params, batch) -> np.ndarray:
    """ln p [N, T, V] of the token at each place, at the sampling temperature."""
    config, method = plan.parts.config, plan.parts.method
    inputs = {name: batch[name] for name in ("input_ids", "segment_ids", "positions")}
    states = decoder.hidden_states(config, method, params, inputs).states
    logits = decoder.logits(config, method, params, states) / HEAT
    return np.roll(np.asarray(jax.nn.log_softmax(logits), np.float64), 1, axis=1)


def test_every_key_of_the_batch_by_hand(iteration):
    plan, policy, reference, batch, told = iteration
    ids, tokenizer = batch["input_ids"], plan.base.tokenizer
    sizes = (batch["segment_ids"] > 0).sum(1)
    ours, theirs = (table(plan, params, batch) for params in (policy, reference))
    prompts = [prompt for prompt in plan.data.stream.take(0, 4) for _ in range(4)]
    rewards, charges, cut, gaps, count = [], [], [], 0.0, 0
    for row, number in enumerate(prompts):
        prompt = plan.data.stream.ids(number)
        start, end = len(prompt), int(sizes[row])
        assert ids[row, :start].tolist() == prompt.tolist()
        new, places = ids[row, start:end], np.arange(start, end)
        ended = new[-1] == EOS
        assert EOS not in new[:-1] and (ended or len(new) == NEW)
        text = tokenizer.decode(new.tolist(), skip_special=True)
        (raw,) = letters([plan.data.stream.text(number)], [text])
        rewards.append(raw + float(soft_overlong(np.array([len(new)]), NEW, OVERLONG)[0]))
        logp, logq = ours[row, places], theirs[row, places]
        charges.append((np.exp(logp) * (logp - logq)).sum())
        chosen = np.arange(len(new)), new
        np.testing.assert_allclose(batch["old_logprobs"][row, places], logp[chosen], atol=2e-5)
        np.testing.assert_allclose(batch["ref_logprobs"][row, places], logq[chosen], atol=2e-5)
        gaps, count = gaps + (logp[chosen] - logq[chosen]).sum(), count + len(new)
        cut.append(not ended)
        inside = np.zeros(ids.shape[1])
        inside[places] = ended  # a completion that was cut off is no target
        assert np.array_equal(batch["loss_mask"][row], inside)
        assert np.array_equal(batch["completions"][row] > 0, inside > 0)
    assert 0 < sum(cut) < ROWS and min(charges) > 0.01
    assert told["truncated"] == pytest.approx(np.mean(cut))
    assert told["reward"] == pytest.approx(np.mean(rewards), rel=1e-5)
    assert told["reward/letters"] > told["reward"]  # before the penalty for length
    assert told["rollout_kl"] == pytest.approx(gaps / count, rel=1e-4)
    left = (np.array(rewards) - COEF * np.array(charges)).reshape(4, 4)
    assert told["penalised_reward"] == pytest.approx(left.mean(), rel=1e-4)
    wanted = np.asarray(ADVANTAGES["group"](left)).reshape(-1)
    for row in range(ROWS):
        found = batch["advantages"][row, sizes[row] - 1]
        assert found == pytest.approx(wanted[row], rel=1e-3, abs=1e-4)
    assert told["sampler_gap"] < 1e-5


def test_logits_are_made_of_new_tokens_alone(iteration, monkeypatch):
    plan, *_, batch, _ = iteration
    state, frozen, _ = plan.abstract_arguments()
    places, real = set(), decoder.logits

    def logits(config, method, params, hidden, **rest):
        places.add(hidden.shape[1])
        return real(config, method, params, hidden, **rest)

    monkeypatch.setattr(decoder, "logits", logits)
    with jax.set_mesh(plan.mesh):
        jax.eval_shape(lambda *given: plan.loss(*given, batch, None), state.trainable, frozen)
    assert places == {NEW}
