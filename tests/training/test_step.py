"""The one step: sums divided once, what it reports, what it does when it cannot go on."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxtune.core.weighted import weighted
from jaxtune.parallel.mesh import make_mesh
from jaxtune.training.loop import Hooks, Totals, run_loop
from jaxtune.training.state import init_state
from jaxtune.training.step import (
    BAD_LEAF,
    make_train_step,
    micro_batches,
    summed_gradients,
    unchanged,
)
from jaxtune.training.stop import BUDGET, FINISHED, NON_FINITE, PREEMPTED, StopRequest

LR = 0.1


def sum_loss(trainable, frozen, batch, key):
    """Weighted least squares, noisy where there is a key that says so."""
    x = batch["x"] @ trainable["w"] + trainable["b"] + frozen["c"]
    if key is not None:
        x = x + frozen["noise"] * jax.random.normal(key, x.shape)
    loss = weighted((x - batch["y"]) ** 2, batch["loss_mask"])
    return loss, {"error": weighted(jnp.abs(x - batch["y"]), batch["loss_mask"])}


def batch_of(rows: int = 8, seed: int = 0):
    rng = np.random.default_rng(seed)
    return {
        "x": rng.standard_normal((rows, 3)).astype(np.float32),
        "y": rng.standard_normal(rows).astype(np.float32),
        "loss_mask": (rng.random(rows) < 0.6).astype(np.float32),
        "segment_ids": np.ones((rows, 4), np.int32),
    }


PARAMS = {"w": jnp.array([0.5, -1.0, 2.0]), "b": jnp.zeros(())}
FROZEN = {"c": jnp.array(0.25), "noise": jnp.array(0.0)}


def step_of(tx=None, grad_accum=1):
    tx = optax.sgd(LR) if tx is None else tx
    step = make_train_step(sum_loss, tx, lambda s: jnp.float32(LR), grad_accum)
    return jax.jit(step), init_state(PARAMS, tx, 0)


def by_hand(batch):
    """(mean loss, mean gradient of w and b) in float64."""
    w = np.asarray(PARAMS["w"], np.float64)
    mask = batch["loss_mask"].astype(np.float64)
    error = batch["x"].astype(np.float64) @ w + 0.25 - batch["y"]
    total = mask.sum()
    g = 2 * error * mask / total
    return (error**2 * mask).sum() / total, batch["x"].T.astype(np.float64) @ g, g.sum()


@pytest.mark.parametrize("grad_accum", [1, 2, 4])
def test_a_step_divides_once_whatever_the_micro_batches(grad_accum):
    batch = batch_of()
    batch["loss_mask"][::4] = 0  # one micro-batch of four holds no target
    step, state = step_of(grad_accum=grad_accum)
    new, report = step(state, FROZEN, batch)
    loss, w, b = by_hand(batch)
    np.testing.assert_allclose(report["loss"], loss, rtol=1e-5)
    np.testing.assert_allclose(report["grad_norm"], np.sqrt((w**2).sum() + b**2), rtol=1e-5)
    np.testing.assert_allclose(new.trainable["w"], PARAMS["w"] - LR * w, rtol=1e-5)
    np.testing.assert_allclose(new.trainable["b"], -LR * b, rtol=1e-5)
    assert report["trained_tokens"] == batch["loss_mask"].sum()
    assert report["tokens"] == batch["segment_ids"].size
    assert report["learning_rate"] == np.float32(LR)
    assert report["unchanged"] == 0.0
    assert new.step == 1 and report[BAD_LEAF] == -1


@pytest.mark.parametrize(
    ("grad_accum", "other"), [(1, "size"), (2, "size"), (4, "size"), (1, "a"), (4, "a")]
)
def test_each_term_of_a_loss_is_divided_by_its_own_weight(grad_accum, other):
    """The second term's weights are as unevenly spread over the micro-batches as they can be.

    Whether its name comes before the first's or after it decides nothing.
    """

    def two_terms(trainable, frozen, batch, key):
        first, metrics = sum_loss(trainable, frozen, batch, key)
        rows = jnp.where(batch["y"] > 0, 3.0, 0.0)
        return {"fit": first, other: weighted(jnp.abs(batch["x"] @ trainable["w"]), rows)}, metrics

    batch = batch_of()
    batch["y"] = np.where(np.arange(8) % 4 == 1, 2.0, -1.0).astype(np.float32)
    loss, w, b = by_hand(batch)
    reached = batch["y"] > 0
    side = np.sign(batch["x"] @ np.asarray(PARAMS["w"]))[:, None] * batch["x"]
    tx = optax.sgd(LR)
    step = jax.jit(make_train_step(two_terms, tx, lambda s: jnp.float32(LR), grad_accum))
    new, report = step(init_state(PARAMS, tx, 0), FROZEN, batch)
    size = np.abs(batch["x"] @ np.asarray(PARAMS["w"]))[reached].mean()
    np.testing.assert_allclose(report["loss/fit"], loss, rtol=1e-5)
    np.testing.assert_allclose(report[f"loss/{other}"], size, rtol=1e-5)
    np.testing.assert_allclose(report["loss"], loss + size, rtol=1e-5)
    wanted = PARAMS["w"] - LR * (w + side[reached].mean(axis=0))
    np.testing.assert_allclose(new.trainable["w"], wanted, rtol=1e-5)
    np.testing.assert_allclose(new.trainable["b"], -LR * b, rtol=1e-5)


def test_rows_go_round_the_micro_batches():
    rows = micro_batches({"x": np.arange(6)}, 3)["x"]
    assert rows.tolist() == [[0, 3], [1, 4], [2, 5]]


def test_each_step_and_each_micro_batch_draws_its_own_noise():
    noisy = FROZEN | {"noise": jnp.array(1.0)}
    step, state = step_of(optax.set_to_zero())
    batch = batch_of()
    first, one = step(state, noisy, batch)
    _, two = step(first, noisy, batch)
    _, again = step(state, noisy, batch)
    assert one["loss"] == again["loss"] != two["loss"]
    same = {k: np.concatenate([v[:1]] * 8) for k, v in batch.items()} | {
        "loss_mask": np.ones(8, np.float32)
    }
    key = jax.random.key(3)
    pieces = [
        summed_gradients(sum_loss, PARAMS, noisy, same, key, count)[0]["loss"].sum
        for count in (1, 2)
    ]
    assert pieces[0] != pieces[1]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_gradient_that_is_not_finite_is_named(bad):
    step, state = step_of()
    broken = batch_of()
    broken["x"][2, 1], broken["loss_mask"][2] = bad, 1.0
    _, report = step(state, FROZEN, broken)
    assert not np.isfinite(report["loss"])
    assert report[BAD_LEAF] == 0  # leaves stand in sorted order: b, w
    # a gradient of 0 · NaN in w alone
    step, state = step_of()
    broken = batch_of()
    broken["loss_mask"][:] = 1
    broken["x"][:] = 0
    huge = {"w": PARAMS["w"].at[0].set(bad), "b": PARAMS["b"]}
    _, report = step(dataclasses.replace(state, trainable=huge), FROZEN, broken)
    assert report[BAD_LEAF] == 0 and not np.isfinite(report["grad_norm"])


def test_a_gradient_whose_norm_overflows_is_bad():
    """Each element is finite, but clipping by an infinite norm would silently train nothing."""
    batch = batch_of()
    batch["x"][:, 0] = 1e15
    batch["y"][:] = 1e9
    batch["loss_mask"][:] = 1
    quiet = {"w": jnp.zeros(3), "b": PARAMS["b"]}
    step, state = step_of()
    _, report = step(dataclasses.replace(state, trainable=quiet), FROZEN, batch)
    assert np.isfinite(report["loss"]) and not np.isfinite(report["grad_norm"])
    assert report[BAD_LEAF] == 1


def test_a_batch_without_targets_moves_nothing():
    step, state = step_of(optax.adam(LR))
    new, report = step(state, FROZEN, batch_of() | {"loss_mask": np.zeros(8, np.float32)})
    assert (report["loss"], report["grad_norm"], report["trained_tokens"]) == (0.0, 0.0, 0.0)
    assert report["unchanged"] == 1.0 and report[BAD_LEAF] == -1
    jax.tree.map(np.testing.assert_array_equal, new.trainable, PARAMS)


def test_unchanged_is_a_share_of_elements():
    before = {"a": jnp.ones(6), "b": jnp.ones(2)}
    after = {"a": jnp.ones(6).at[0].set(2.0), "b": jnp.zeros(2)}
    assert unchanged(before, after) == pytest.approx(5 / 8)


# -- the loop ------------------------------------------------------------------------------------


@dataclasses.dataclass
class Seen:
    rows: list = dataclasses.field(default_factory=list)
    saved: list = dataclasses.field(default_factory=list)
    evaluated: list = dataclasses.field(default_factory=list)

    def hooks(self) -> Hooks:
        def evaluate(state):
            self.evaluated.append(int(state.step))
            return {"eval/loss": 1.0}

        def save(step, state, totals, last):
            self.saved.append((step, int(state.step), totals.trained_tokens, dict(last)))

        return Hooks(self.rows.append, evaluate, save, lambda *_: None)


def loop(batches, seen, stop=None, **settings):
    mesh = make_mesh({})
    step, state = step_of()
    totals, rest = Totals(), iter(batches)
    options = {"total_steps": 6, "log_every": 2, "eval_every": 3, "save_every": 4} | settings
    with jax.set_mesh(mesh):
        outcome = run_loop(
            step,
            state,
            FROZEN,
            lambda state: (next(rest), {}),
            seen.hooks(),
            totals,
            mesh=mesh,
            stop=StopRequest() if stop is None else stop,
            **options,
        )
    return outcome, totals


def test_things_happen_at_multiples_of_their_period_and_at_the_end():
    seen = Seen()
    outcome, totals = loop([batch_of(seed=s) for s in range(6)], seen)
    assert (outcome.stop_reason, outcome.step) == (FINISHED, 6)
    assert [row["step"] for row in seen.rows if "loss" in row] == [1, 2, 4, 6]
    assert seen.evaluated == [3, 6]
    assert [(step, at) for step, at, *_ in seen.saved] == [(4, 4), (6, 6)]
    # a save carries the evaluation of its own step, if there was one
    assert [last for *_, last in seen.saved] == [{}, {"eval/loss": 1.0}]
    assert totals.tokens == 6 * 32
    trained = sum(int(batch_of(seed=s)["loss_mask"].sum()) for s in range(6))
    assert totals.trained_tokens == seen.saved[-1][2] == trained


def test_c33_batches_without_targets_are_counted():
    """https://github.com/hiyouga/LLaMA-Factory/issues/2916."""
    empty = batch_of() | {"loss_mask": np.zeros(8, np.float32)}
    outcome, totals = loop([batch_of(), empty, batch_of(), empty, empty, batch_of()], Seen())
    assert outcome.stop_reason == FINISHED
    assert totals.empty_steps == 3


@pytest.mark.parametrize("at", [1, 3, 4, 5, 6])
def test_c33_the_loop_stops_at_a_bad_step_before_it_saves_or_evaluates_it(at):
    batches = [batch_of(seed=s) for s in range(6)]
    batches[at - 1]["x"][:], batches[at - 1]["loss_mask"][:] = np.nan, 1
    seen = Seen()
    outcome, _ = loop(batches, seen)
    assert (outcome.stop_reason, outcome.step) == (NON_FINITE, at)
    assert f"step {at}: the gradient of b" in outcome.detail
    assert all(step < at for step, *_ in seen.saved)
    assert all(step < at for step in seen.evaluated)
    assert all(row["step"] < at and np.isfinite(row.get("loss", 0)) for row in seen.rows)


def test_a_stop_that_was_asked_for_saves_first():
    stop = StopRequest()

    def batches():
        for s in range(6):
            if s == 4:
                stop.signal = "SIGTERM"
            yield batch_of(seed=s)

    seen = Seen()
    outcome, _ = loop(batches(), seen, stop, save_every=None)
    assert (outcome.stop_reason, outcome.step) == (PREEMPTED, 5)
    assert "SIGTERM" in outcome.detail
    assert [(step, at) for step, at, *_ in seen.saved] == [(5, 5)]


def test_a_spent_budget_saves_and_stops_and_a_larger_one_goes_on():
    seen = Seen()
    batches = [batch_of(seed=s) for s in range(6)]
    outcome, totals = loop(batches, seen, seconds_limit=1e-9, save_every=None)
    assert (outcome.stop_reason, outcome.step) == (BUDGET, 1)
    assert [(step, at) for step, at, *_ in seen.saved] == [(1, 1)] and totals.seconds > 0
    outcome, _ = loop(batches, Seen(), seconds_limit=1e9)
    assert (outcome.stop_reason, outcome.step) == (FINISHED, 6)


def test_a_run_whose_budget_is_spent_does_no_step():
    seen = Seen()
    outcome, _ = loop([], seen, seconds_limit=0.0)
    assert (outcome.stop_reason, outcome.step) == (BUDGET, 0)
    assert seen.saved == [] and "spent" in outcome.detail


def test_a_stop_in_the_last_step_is_a_finished_run():
    stop = StopRequest()

    def batches():
        for s in range(6):
            if s == 5:
                stop.signal = "SIGTERM"
            yield batch_of(seed=s)

    outcome, _ = loop(batches(), Seen(), stop)
    assert (outcome.stop_reason, outcome.step) == (FINISHED, 6)
