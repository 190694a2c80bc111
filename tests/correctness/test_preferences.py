"""Losses of pairs: C1, C2, C10, C21, C33, each completion told from the others."""

from __future__ import annotations

import functools
import math

import jax
import numpy as np
import pytest

from jaxtune.models.decoder import hidden_states, logits
from jaxtune.objectives.completions import Pair
from jaxtune.objectives.dpo import LOSSES
from jaxtune.parallel.mesh import make_mesh
from jaxtune.recipes import preference
from jaxtune.recipes.base import BASE
from jaxtune.recipes.reference import base_of
from tests.correctness.pairs import assert_same, config_of, measure, pair_batch, pair_examples
from tests.correctness.small import METHODS, small

pytestmark = pytest.mark.slow

PEFT = {"method": "lora", "rank": 3}
OBJECTIVES = {
    "dpo": {"name": "dpo", "nll_weight": 0.3},
    "ipo": {"name": "dpo", "loss_type": "ipo"},
    "orpo": {"name": "orpo"},
    "simpo": {"name": "simpo"},
    "cpo": {"name": "cpo", "label_smoothing": 0.1},
}
PAIRS = pair_examples([(4, 5, 3), (2, 1, 9), (6, 2, 2), (1, 7, 4), (3, 3, 3), (5, 8, 1)])
WEIGHTS = [1.0, 0.5, 2.0, 1.0, 1.0, 3.0]
RAGGED = [[pair] for pair in PAIRS]


@functools.cache
def measure_of(name: str, devices: int = 1, count: int = 1):
    model = small("lora", mesh=make_mesh({"fsdp": devices}))
    return measure(model, config_of(PEFT, OBJECTIVES[name]), count)


@functools.cache
def logprobs_by_hand():
    """A function that gives the table of log-probabilities [16, V] of one sequence."""

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def run(config, method, params, ids, segments):
        batch = {"input_ids": ids, "segment_ids": segments, "positions": np.arange(16)[None]}
        states = hidden_states(config, method, params, batch).states
        return jax.nn.log_softmax(logits(config, method, params, states))[0]

    return run


model_by_hand = functools.cache(lambda: small("lora"))


def sum_by_hand(which: str, prompt, completion) -> float:
    """The log-probability of a completion behind its prompt under "policy" or "base"."""
    model = model_by_hand()
    config = model.parts.config
    bare = which == "base"
    method = BASE if bare else model.method
    params = base_of(config, model.params) if bare else model.params
    ids, whole = np.zeros((1, 16), np.int32), [*prompt, *completion]
    ids[0, : len(whole)] = whole
    segments = (np.arange(16)[None] < len(whole)).astype(np.int32)
    table = np.asarray(logprobs_by_hand()(config, method, params, ids, segments))
    return float(sum(table[t - 1, whole[t]] for t in range(len(prompt), len(whole))))


@functools.cache
def sums_by_hand() -> list[dict]:
    """Of each pair: log-probability of each side under policy and base, one sequence at a time."""
    return [
        {"lengths": (len(chosen), len(rejected))}
        | {
            which: tuple(sum_by_hand(which, prompt, side) for side in (chosen, rejected))
            for which in ("policy", "base")
        }
        for prompt, chosen, rejected in PAIRS
    ]


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


def loss_by_hand(name: str) -> float:
    """The formulas of the papers in plain Python."""
    total = 0.0
    for row, weight in zip(sums_by_hand(), WEIGHTS, strict=True):
        (pc, pr), (bc, br), (nc, nr) = row["policy"], row["base"], row["lengths"]
        if name == "dpo":
            loss = -log_sigmoid(0.1 * ((pc - bc) - (pr - br)))
        elif name == "ipo":
            loss = ((pc - bc) / nc - (pr - br) / nr - 1 / 0.2) ** 2
        elif name == "simpo":
            loss = -log_sigmoid(2.0 * (pc / nc - pr / nr) - 1.0)
        elif name == "cpo":
            loss = -0.9 * log_sigmoid(0.1 * (pc - pr)) - 0.1 * log_sigmoid(-0.1 * (pc - pr))
        else:
            odds = [p / n - math.log(1 - math.exp(p / n)) for p, n in ((pc, nc), (pr, nr))]
            loss = -0.1 * log_sigmoid(odds[0] - odds[1])
        total += weight * loss
    loss = total / sum(WEIGHTS)
    nll = -sum(row["policy"][0] for row in sums_by_hand())
    nll /= sum(row["lengths"][0] for row in sums_by_hand())
    return loss + {"dpo": 0.3, "orpo": 1.0, "cpo": 1.0}.get(name, 0.0) * nll


@pytest.mark.parametrize("name", OBJECTIVES)
def test_c10_the_loss_of_pairs_by_hand(name):
    """Each completion's log-probability is that of its own tokens behind its own prompt."""
    batch = pair_batch(METHODS["lora"], RAGGED, WEIGHTS)
    loss, metrics, _ = measure_of(name)(batch)
    assert loss == pytest.approx(loss_by_hand(name), rel=1e-5)
    right = [row for row, w in zip(sums_by_hand(), WEIGHTS, strict=True) for _ in range(int(2 * w))]
    if name == "dpo":
        margins = [(r["policy"][0] - r["base"][0]) - (r["policy"][1] - r["base"][1]) for r in right]
        assert metrics["accuracy"] == pytest.approx(np.mean([m > 0 for m in margins]), rel=1e-6)
        assert metrics["margin"] == pytest.approx(0.1 * np.mean(margins), rel=1e-4)
        chosen = np.mean([r["policy"][0] for r in right])
        assert metrics["logps/chosen"] == pytest.approx(chosen, rel=1e-5)


@pytest.mark.parametrize("kind", LOSSES)
def test_c21_what_the_loss_is_where_policy_and_reference_are_one(kind):
    """ln 2 for all that a sigmoid is in; a run compares its first batch with it."""
    smoothed = {"label_smoothing": 0.1} if LOSSES[kind].smoothed else {}
    settings = {"name": "dpo", "loss_type": kind, "beta": 0.4, **smoothed}
    o = config_of(PEFT, settings).objective
    one = Pair(np.array([[-3.0, -20.0]]), np.array([[-8.0, -1.0]]))
    sizes = Pair(np.array([[2.0, 9.0]]), np.array([[3.0, 1.0]]))
    loss, metrics = preference.dpo_term(o)(
        preference.Sides(one, one, sizes, np.ones((1, 2), np.float32))
    )
    assert loss.mean() == pytest.approx(preference.loss_at_start(o), rel=1e-6)
    assert metrics["rewards/margin"].mean() == 0


@pytest.mark.parametrize("name", OBJECTIVES)
def test_c1_c2_micro_batches_devices_and_order_do_not_matter(name):
    """https://github.com/huggingface/trl/issues/2175, https://github.com/huggingface/trl/issues/6380."""
    batch = pair_batch(METHODS["lora"], RAGGED, WEIGHTS)
    whole = measure_of(name)(batch)
    order = np.random.default_rng(1).permutation(8)
    assert_same(measure_of(name)({k: v[order] for k, v in batch.items()}), whole)
    if name in ("dpo", "orpo"):  # sums and means over tokens; the others are built as they are
        assert_same(measure_of(name, devices=2, count=4)(batch), whole)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_c11_pairs_in_one_row_equal_pairs_in_rows_of_their_own(name):
    """A pair's neighbours in its row are neither seen nor added to it."""
    apart = measure_of(name)(pair_batch(METHODS["lora"], RAGGED[2:5], WEIGHTS))
    packed = measure_of(name)(pair_batch(METHODS["lora"], [PAIRS[2:4], PAIRS[4:5]], WEIGHTS))
    assert_same(packed, apart)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_c33_a_batch_without_pairs_gives_no_gradient(name):
    """0/0: https://github.com/hiyouga/LLaMA-Factory/issues/2916."""
    loss, _, grads = measure_of(name)(pair_batch(METHODS["lora"], []))
    assert loss == 0.0
    assert all(np.array_equal(g, np.zeros_like(g)) for g in grads.values())
