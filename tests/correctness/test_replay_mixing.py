"""Old data beside what an objective learns from: C1, C2 and C26 of its terms, with every one."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxtune
from jaxtune.core.errors import RequestError
from jaxtune.core.tree import combine, flatten
from jaxtune.models import decoder
from jaxtune.parallel.batches import global_batch
from jaxtune.parallel.mesh import batch_shards, make_mesh
from jaxtune.recipes.assemble import load_parts
from jaxtune.recipes.base import BASE
from jaxtune.recipes.build import build
from jaxtune.recipes.objectives import OBJECTIVES
from jaxtune.recipes.reference import base_of
from jaxtune.recipes.retention.replay_mixing import with_terms
from jaxtune.recipes.rows import Rows
from jaxtune.recipes.schema.resolve import resolve
from jaxtune.training.compile import fresh_state
from jaxtune.training.step import mean_loss, summed_gradients, unit_weight
from tests.correctness import interrupts, pairs
from tests.correctness.interrupts import Workbench
from tests.correctness.pair_runs import pair_config
from tests.correctness.runs import run_config, write_examples
from tests.correctness.small import batch_of, examples, small
from tests.correctness.tiny_runs import assert_same_run
from tests.rl import test_policy_loss as rollouts
from tests.rl.tiny import replaying as online_replaying
from tests.rl.tiny import run_config as online_config

pytestmark = pytest.mark.slow

NLL, KL, HEAT = 0.7, 0.4, 1.5
LENGTHS = ((5, 9, 17), (31,), (), (12, 4), (44,), (3,), (20, 20), (8, 6, 7, 9))
ONLINE = ("grpo", "ppo")
# These are compiled; of the others, whose terms are wired the same way, the step is traced.
STEPPED = ("kto",)  # PPO in tests/rl/test_rollout_resume.py


def replaying(directory: Path, lengths=(5, 9, 7, 4, 12, 3), **more: Any) -> dict[str, Any]:
    """The section `retention` that replays token examples."""
    source = write_examples(directory / "old.jsonl", lengths, 7)
    return {"replay_data": [{"source": source, "format": "tokens"}], "replay": NLL} | more


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("replay")


def step_of(name: str, data: Path) -> tuple[Any, dict[str, Any]]:
    """(resolved config, batch) of an objective, which is ragged and has empty rows."""
    if name in ONLINE:
        config = rollouts.objective_of(name, data)
        return config, rollouts.rollouts(config)
    config = pairs.config_of({"method": "lora", "rank": 3}, {"name": name})
    sizes = [[(3, 4, 6)], [(2, 1, 5), (4, 2, 2)], [(5, 8, 3)], [], [(2, 2, 2)], [(6, 9, 1)]]
    rows = [pairs.pair_examples(row, seed) for seed, row in enumerate(sizes)]
    return config, pairs.pair_batch(small("lora").method, rows)


def gradients(model: Any, loss: Any, batch: dict[str, Any], count: int):
    """(mean loss, {metric: mean}, {path: mean gradient}) over so many micro-batches."""

    @jax.jit
    def run(trainable, frozen, batch):
        losses, metrics, grads = summed_gradients(
            loss, trainable, frozen, batch, jax.random.key(0), count
        )
        weight = unit_weight(losses)
        means = {name: value.mean() for name, value in metrics.items()}
        means |= {f"loss/{name}": value.mean() for name, value in losses.items()}
        return mean_loss(losses), means, jax.tree.map(lambda g: g / weight, grads)

    with jax.set_mesh(model.mesh):
        found = run(*model.parts.split(model.params), global_batch(batch, model.mesh))
    flat = {p: np.asarray(g) for p, g in flatten(found[2]).items() if g is not None}
    return float(found[0]), {n: float(v) for n, v in found[1].items()}, flat


def by_hand(model: Any, batch: dict[str, Any]):
    """(NLL, KL, gradient of their weighted sum) a target from whole tables of logits."""
    config, method = model.parts.config, model.method
    base = base_of(config, model.params)
    inputs = {name: batch[name] for name in ("input_ids", "segment_ids", "positions")}
    weights = batch["loss_mask"][:, 1:]

    def table(*arguments: Any) -> jax.Array:
        return decoder.logits(*arguments, decoder.hidden_states(*arguments, inputs).states)[:, :-1]

    def value(trainable: Any, rest: Any):
        logits = table(config, method, combine(trainable, rest))
        chosen = jnp.take_along_axis(
            jax.nn.log_softmax(logits), batch["input_ids"][:, 1:, None], axis=-1
        )[..., 0]
        p, q = (jax.nn.log_softmax(x / HEAT) for x in (table(config, BASE, base), logits))
        apart = (jnp.exp(p) * (p - q)).sum(-1)
        nll, kl = (mean_of(x, weights) for x in (-chosen, apart))
        return NLL * nll + KL * HEAT**2 * kl, (nll, kl)

    run = jax.jit(jax.value_and_grad(value, has_aux=True))
    (_, (nll, kl)), grads = run(*model.parts.split(model.params))
    flat = {p: np.asarray(g) for p, g in flatten(grads).items() if g is not None}
    return float(nll), float(kl), flat


def mean_of(values: jax.Array, weights: np.ndarray) -> jax.Array:
    return (values * weights).sum() / weights.sum()


@pytest.mark.parametrize("name", ["dpo", "grpo"])
def test_a_step_is_the_sum_of_both_in_micro_batches_and_on_four_devices(name, data):
    """C1, C2: one device and one batch for each alone, four and two for them together."""
    config, own = step_of(name, data)
    section = {"replay_kl": KL, "kl_temperature": HEAT, "replay_batch_size": 8}
    told = config.to_dict() | {"retention": replaying(data, **section)}
    config = resolve(told | {"batch_size": 8})
    objective, one = OBJECTIVES[name], small("lora")
    old = batch_of(one.method, [examples(row, i) for i, row in enumerate(LENGTHS)])
    loss, metrics, grads = gradients(one, objective.trained(config, one.parts, Rows(1)), own, 1)
    nll, kl, wanted = by_hand(one, old)

    mesh = make_mesh({"data": 2, "fsdp": 2})
    four = small("lora", mesh=mesh)
    rows = Rows(batch_shards(mesh))
    both = with_terms(
        objective.trained(config, four.parts, rows), objective.term, config, four.parts, rows.shards
    )
    found, seen, summed = gradients(four, both, own | {"replay": old}, 2)
    assert kl > 1e-3
    assert seen["replay_nll"] == pytest.approx(nll, rel=1e-5)
    assert seen["loss/replay"] == pytest.approx(NLL * nll, rel=1e-5)
    assert seen["loss/replay_kl"] == pytest.approx(KL * HEAT**2 * kl, rel=1e-4)
    assert found == pytest.approx(loss + NLL * nll + KL * HEAT**2 * kl, rel=1e-5)
    for key, value in metrics.items():  # the objective's own, its one term under its name
        key = f"loss/{objective.term}" if key == "loss/loss" else key
        assert seen[key] == pytest.approx(value, rel=1e-4, abs=1e-6), key
    assert summed.keys() == grads.keys() == wanted.keys()
    for path, grad in summed.items():
        expected = grads[path] + wanted[path]
        scale = np.abs(expected).max()
        np.testing.assert_allclose(grad, expected, rtol=0, atol=1e-5 * scale, err_msg=path)


def config_of(name: str, data: Path, **changes: Any) -> dict[str, Any]:
    """A run of an objective of four steps, two micro-batches each, that replays six rows a step."""
    place = data / name
    place.mkdir(exist_ok=True)
    retention = replaying(place, replay_kl=KL, replay_batch_size=6)
    lora = {"method": "lora", "rank": 3}
    if name in ONLINE:
        config = online_config(place, name, eval={}, data__eval=[], total_steps=6)
        retention = online_replaying(place, replay=NLL, replay_kl=KL, replay_batch_size=6)
    elif name in ("sft", "pretrain", "distill"):
        config = run_config(place, lora).to_dict() | {"objective": {"name": name}}
    else:
        config = pair_config(place, lora, {"name": name})
    if name == "distill":
        config["objective"]["teacher"] = str(data / "teacher")
    return config | {"retention": retention, "grad_accum": 2} | changes


@pytest.fixture(scope="module")
def bench() -> Workbench:
    return Workbench()


@pytest.fixture(scope="module")
def undisturbed(data, bench) -> tuple[dict[str, Any], list[dict[str, float]], list[str]]:
    """(config, rows, batches) of a run of DPO that replays, which nothing stopped."""
    config = config_of("dpo", data, checkpoint={"every_steps": 2, "async_save": False})
    config["retention"]["data"] = [config["retention"]["replay_data"][0] | {"name": "old"}]
    history = bench.train(config, data / "teacher").history
    return config, history, bench.batches


def test_c26_a_run_that_is_stopped_replays_on_to_the_same_bits(undisturbed, bench, data, tmp_path):
    config, history, batches = undisturbed
    first, _, third, _ = (row for row in history if "loss" in row)
    assert first["loss/preference"] == pytest.approx(math.log(2), rel=1e-5)
    assert first["loss/replay_kl"] == pytest.approx(0.0, abs=1e-6)  # it starts as its base
    assert first["loss/replay"] == pytest.approx(NLL * first["replay_nll"])
    assert third["loss/replay_kl"] > 1e-4
    assert len(set(batches)) == 4
    with interrupts.after_the_row(3):
        bench.train(config, tmp_path / "run")
    source = data / "dpo/old.jsonl"
    kept = source.read_text()
    source.write_text(kept.splitlines()[0] + "\n")
    with pytest.raises(RequestError, match=r"retention\.replay_data: the replay data changed"):
        jaxtune.train(config, tmp_path / "run")
    source.write_text(kept)
    bench.train(config, tmp_path / "run")
    assert bench.batches == batches[2:]  # from the checkpoint of step 2
    assert_same_run(data / "teacher", tmp_path / "run")
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["replay"]["sources"][0]["records"] == 6
    assert len(summary["replay"]["review"]) == 1
    page = (tmp_path / "run/report.html").read_text()
    assert f"replaying jsonl:{source}" in page and "Replayed beside them" in page


def test_what_is_replayed_is_kept(undisturbed, bench, tmp_path):
    config, history, _ = undisturbed
    alone = config | {"retention": {"data": config["retention"]["data"]}}
    free = bench.train(alone, tmp_path / "run").history
    assert "loss/replay" not in free[1] and free[0] == history[0]  # before the first step
    with_it, without = (rows[-1]["retention/nll_rise"] for rows in (history, free))
    assert with_it < -0.02 and with_it < without - 0.02
    assert history[-1]["eval/loss"] < math.log(2)  # and the pairs are learned


@pytest.mark.parametrize("name", [name for name in OBJECTIVES if name != "reward"])
def test_every_objective_has_a_step_with_it(name, undisturbed, data):
    """The objective's rows are padding, so that all of the step is what is replayed."""
    plan = build(resolve(config_of(name, data)))
    config, term = plan.config, f"loss/{plan.objective.term}"
    if name not in STEPPED:
        with jax.set_mesh(plan.mesh):
            _, report = jax.eval_shape(plan.step, *plan.abstract_arguments())
        assert report.keys() >= {term, "loss/replay", "loss/replay_kl", "replay_nll"}
        return
    with jax.set_mesh(plan.mesh):
        params = load_parts(plan.base, plan.parts, plan.mesh, 0, None)
        trainable, frozen = plan.parts.split(params)
        state = fresh_state(trainable, plan.tx, 0, plan.layout)
        own = plan.objective.padding(config, plan.data, 1, 0)
        batch = {name: np.repeat(x, config.batch_size, axis=0) for name, x in own.items()}
        batch["replay"] = plan.data.replay.batch(0, 6)
        shapes = jax.tree.map(lambda x: (x.shape, x.dtype), batch)
        assert shapes == jax.tree.map(lambda x: (x.shape, x.dtype), plan.abstract_arguments()[2])
        _, report = plan.step(state, frozen, global_batch(batch, plan.mesh))
    assert report[term] == 0 and report["loss"] == report["loss/replay"]
    assert float(report["loss/replay"]) == pytest.approx(NLL * float(report["replay_nll"]))
    assert report["replay_nll"] > 3 and abs(report["loss/replay_kl"]) < 1e-6
    assert report["grad_norm"] > 0.01 and report["unchanged"] < 0.9


@pytest.mark.parametrize(
    ("retention", "told"),
    [
        ({"replay_data": []}, r"retention\.replay: needs retention\.replay_data, which is empty"),
        (
            {"replay_data": [], "replay": 0.0, "replay_batch_size": 4},
            r"retention\.replay_batch_size: needs retention\.replay_data",
        ),
        ({"replay": 0.0}, r"retention\.replay_data: needs a strength, retention\.replay or"),
        ({"replay": -1.0}, r"retention\.replay: expected a number ≥ 0"),
        ({"replay_batch_size": 3}, r"retention\.replay_batch_size: grad_accum = 2 does not divide"),
    ],
)
def test_what_contradicts_is_refused(data, retention, told):
    config = config_of("sft", data)
    config["retention"] = config["retention"] | {"replay_kl": 0.0} | retention
    with pytest.raises(RequestError, match=told):
        resolve(config)


def test_what_cannot_be_replayed_is_refused(data):
    config = config_of("sft", data)
    config["retention"]["replay_data"][0]["format"] = "preference"
    with pytest.raises(RequestError, match=r"replay_data\[0\]\.format: 'preference' has no loss a"):
        resolve(config)
    with pytest.raises(
        RequestError, match=r"retention\.replay_data: .* a reward model has no logits"
    ):
        resolve(config_of("reward", data))
    with pytest.raises(RequestError, match=r"retention\.replay_kl: needs a base that stays"):
        build(resolve(config_of("sft", data, peft={"method": "full"})))
    spread = config_of("sft", data, batch_size=8, mesh={"data": 2, "fsdp": 2})
    with pytest.raises(RequestError, match=r"replay_batch_size: 6 rows do not split into 2 micro"):
        build(resolve(spread))
