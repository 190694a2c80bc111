"""What a run retains: measured, pulled back, gated, and picked from."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxtune
from jaxtune.checkpoints.pareto import front
from jaxtune.cli.main import main
from jaxtune.core.errors import RequestError
from jaxtune.core.tree import flatten, unflatten
from jaxtune.recipes.assemble import load_parts
from jaxtune.recipes.build import build
from jaxtune.recipes.runs import open_run
from jaxtune.recipes.schema.resolve import resolve
from tests.correctness.runs import run_config, write_examples

pytestmark = pytest.mark.slow


def config_of(directory: Path, peft="lora", **sections):
    directory.mkdir(exist_ok=True)
    source = write_examples(directory / "old.jsonl", (9, 12, 7, 15), 7)
    narrow(directory / "old.jsonl", 50, 40)
    retention = {"data": [{"source": source, "format": "tokens", "name": "old"}]}
    retention |= sections.pop("retention", {})
    base = {"eval": {"every_steps": 1}, "checkpoint": {"every_steps": 1, "async_save": False}}
    config = run_config(directory, peft, optim={"lr": 0.2})  # so that it forgets
    narrow(directory / "train.jsonl", 0, 40)
    for name, values in ({"retention": retention} | base | sections).items():
        if isinstance(values, dict):
            config[name] = dict(config.get(name, {})) | values
        else:
            config[name] = values
    return config


def narrow(path: Path, first: int, count: int) -> None:
    """Leaves only so many ids, so that what is learned of these is lost of the others."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        row["input_ids"] = [first + i % count for i in row["input_ids"]]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A LoRA run of four steps, each measured and saved."""
    directory = tmp_path_factory.mktemp("run")
    jaxtune.train(config_of(directory), directory / "run")
    return directory / "run"


def rows_of(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def measured(workdir: Path) -> dict[int, dict]:
    return {row["step"]: row for row in rows_of(workdir) if "retention/nll" in row}


def test_it_is_measured_before_during_and_after(run):
    rows = measured(run)
    assert list(rows) == [0, 1, 2, 3, 4]
    assert rows[0]["retention/nll_rise"] == 0.0
    for row in rows.values():
        rise = row["retention/nll"] - rows[0]["retention/nll"]
        assert row["retention/nll_rise"] == pytest.approx(rise)
    config = json.loads((run / "config.json").read_text())
    base = build(resolve(config))
    lm = jaxtune.load(run, dtype="float32")
    for step, model in ((0, lm.use(None)), (4, lm)):
        total = weight = 0.0
        for index in range(len(base.retention.stores["old"])):
            ids, mask = base.retention.stores["old"].example(index)
            logprobs = np.asarray(model.logprobs(ids[None]))[0]
            total -= float((logprobs * mask[1:]).sum())
            weight += float(mask[1:].sum())
        assert rows[step]["retention/nll"] == pytest.approx(total / weight, rel=1e-4)
    summary = json.loads((run / "summary.json").read_text())
    assert summary["metrics"]["retention/nll"] == rows[4]["retention/nll"]


def test_the_front_of_checkpoints_is_kept_and_picked_from(run, tmp_path):
    rows = measured(run)
    points = {s: (r["eval/loss"], r["retention/nll"]) for s, r in rows.items() if s}
    held = {int(path.name) for path in (run / "checkpoints").iterdir() if path.name.isdigit()}
    assert held == set(front(points)) | {3, 4}  # and the newest two
    for how, step in (
        ("target", min(points, key=lambda s: points[s])),
        ("retention", min(front(points), key=lambda s: points[s][1])),
    ):
        lm = jaxtune.load(run, dtype="float32", pick=how)
        assert held_out(lm, run) == pytest.approx(points[step][0], rel=1e-4)
    words = [f"--model={run}", "--format=jaxtune", f"--out={tmp_path / 'out'}", "--pick=knee"]
    assert main(["export", *words]) == 0
    with pytest.raises(RequestError, match="pick: only a run"):
        jaxtune.load(tmp_path, pick="knee")


def held_out(lm, run: Path) -> float:
    plan = build(resolve(json.loads((run / "config.json").read_text())))
    (store,) = plan.data.evals.values()
    total = weight = 0.0
    for index in range(len(store)):
        ids, mask = store.example(index)
        total -= float((np.asarray(lm.logprobs(ids[None]))[0] * mask[1:]).sum())
        weight += float(mask[1:].sum())
    return total / weight


@pytest.mark.parametrize("on_rise", ["stop", "rollback"])
def test_the_gate_stops_the_run(tmp_path, run, on_rise):
    """The bound lies below the first rise that the free run reached after its first step."""
    rises = {step: row["retention/nll_rise"] for step, row in measured(run).items()}
    over = next(step for step in (2, 3, 4) if rises[step] > max(rises[s] for s in range(step)))
    bound = (rises[over] + max(rises[s] for s in range(over))) / 2
    config = config_of(tmp_path, retention={"max_rise": bound, "on_rise": on_rise})
    summary = jaxtune.train(config, tmp_path / "run").summary
    assert (summary["stop_reason"], summary["step"]) == ("retention", over)
    assert "retention/nll rose by" in summary["detail"]
    assert open_run(tmp_path / "run").step == (over if on_rise == "stop" else over - 1)
    before = rows_of(tmp_path / "run")
    assert jaxtune.train(config, tmp_path / "run").summary == summary  # the same again: nothing
    assert rows_of(tmp_path / "run") == before


def test_a_pull_keeps_the_parameters_near_their_start(tmp_path):
    """Against descent written out; EWC's weights are squares of each example's gradient."""
    found = {}
    for name, retention in (
        ("free", {}),
        ("l2sp", {"l2sp": 5.0}),
        ("ewc", {"ewc": 5.0}),
    ):
        config = config_of(tmp_path / name, "full", retention=retention, total_steps=3)
        config.optim = {"name": "sgd", "momentum": 0.0, "lr": 0.05, "clip_norm": None}
        config.checkpoint.keep = 5
        jaxtune.train(config, tmp_path / name / "run")
        found[name] = (
            config,
            flatten(jaxtune.load(tmp_path / name / "run", dtype="float32").params),
        )
    for name in ("l2sp", "ewc"):
        by_hand(found[name][0], found[name][1], name)
    start = flatten(start_of(found["free"][0])[1])
    moved = {
        name: sum(float(jnp.sum((params[p] - start[p]) ** 2)) for p in start)
        for name, (_, params) in found.items()
    }
    assert moved["l2sp"] < moved["ewc"] < moved["free"]


def start_of(config):
    plan = build(resolve(config))
    return plan, load_parts(plan.base, plan.parts, plan.mesh, plan.config.seed, None)


def by_hand(config, found, name):
    plan, params = start_of(config)
    loss = plan.retention.loss

    def mean(params, batch):
        total, _ = loss(params, plan.parts.split(params)[1], batch, None)
        return total.sum / total.weight

    def nll(params, batch):
        return loss(params, plan.parts.split(params)[1], batch, None)[0].sum

    start, strength = params, 5.0
    weights = jax.tree.map(jnp.ones_like, params)
    if name == "ewc":
        weights = jax.tree.map(jnp.zeros_like, params)
        store = plan.retention.stores["old"]
        for index in range(len(store)):
            batch = next(plan.retention.batches(store))
            one = {key: array[index : index + 1] for key, array in batch.items()}
            grads = jax.grad(nll)(params, one)
            weights = jax.tree.map(lambda w, g: w + g**2 / len(store), weights, grads)
    for step in range(3):
        batch = plan.data.stream.batch(step, config.batch_size)
        grads = jax.grad(mean)(params, batch)
        params = jax.tree.map(
            lambda p, g, s, w: p - 0.05 * (g + strength * w * (p - s)),
            params,
            grads,
            start,
            weights,
        )
    wanted = flatten(params)
    for path, leaf in found.items():
        np.testing.assert_allclose(leaf, wanted[path], atol=2e-6, err_msg=path)


def test_ewc_goes_on_exactly_after_a_stop(tmp_path):
    """θ₀ and the Fisher information come from the checkpoint."""
    whole = config_of(tmp_path / "a", retention={"ewc": 50.0, "l2sp": 0.5})
    jaxtune.train(whole, tmp_path / "a/run")
    half = config_of(tmp_path / "b", retention={"ewc": 50.0, "l2sp": 0.5}, total_steps=2)
    jaxtune.train(half, tmp_path / "b/run")
    half.total_steps = 4
    jaxtune.train(half, tmp_path / "b/run", allow_change=True)
    a, b = (flatten(jaxtune.load(tmp_path / n / "run", dtype="float32").params) for n in "ab")
    assert all(np.array_equal(a[path], b[path]) for path in a)


@pytest.mark.parametrize(
    ("retention", "told"),
    [
        ({"data": [], "ewc": 1.0}, "retention.ewc: needs retention.data"),
        ({"data": [], "max_rise": 1.0}, "retention.max_rise: needs retention.data"),
        ({"on_rise": "rollback"}, "retention.on_rise: 'rollback' needs retention.max_rise"),
        ({"max_rise": -1.0}, "retention.max_rise: expected a number > 0"),
        ({"l2": 1.0}, "retention.l2: unknown key"),
    ],
)
def test_what_contradicts_is_refused(tmp_path, retention, told):
    with pytest.raises(RequestError, match=told):
        resolve(config_of(tmp_path, retention=retention))


def test_the_kl_from_the_base_is_a_term_of_its_own(tmp_path):
    """Value by whole logits; in the step, with micro-batches, divided by its own weight."""
    config = config_of(tmp_path, "lora", retention={"kl": 0.5, "kl_temperature": 2.0})
    config.peft = {"method": "lora", "rank": 3}
    config.grad_accum, config.total_steps = 2, 2
    jaxtune.train(config, tmp_path / "run")
    first, second = (row for row in rows_of(tmp_path / "run") if "loss/retention_kl" in row)
    assert first["loss/retention_kl"] == pytest.approx(0.0, abs=1e-6)  # it starts as its base
    assert second["loss"] == pytest.approx(second["loss/sft"] + second["loss/retention_kl"])

    plan, params = start_of(config)
    noisy = {p: leaf + 0.3 if "lora/b" in p else leaf for p, leaf in flatten(params).items()}
    trainable, frozen = plan.parts.split(unflatten(noisy))
    batch = plan.data.stream.batch(0, 4)
    losses, _ = plan.loss(trainable, frozen, batch, None)
    lm = jaxtune.load(tmp_path / "run", dtype="float32")
    model = dataclasses.replace(lm, params=unflatten(noisy))
    base, total, weight = lm.use(None), 0.0, 0.0
    for ids, segments, mask in zip(
        batch["input_ids"], batch["segment_ids"], batch["loss_mask"], strict=True
    ):
        real = int((segments > 0).sum())
        p, q = (jax.nn.log_softmax(m.logits(ids[None, :real])[0, :-1] / 2.0) for m in (base, model))
        kl = jnp.sum(jnp.exp(p) * (p - q), axis=-1)
        total += float(jnp.sum(kl * mask[1:real]))
        weight += float(mask[1:real].sum())
    term = losses["retention_kl"]
    assert float(term.weight) == weight
    assert float(term.mean()) == pytest.approx(0.5 * 4.0 * total / weight, rel=1e-4)


def test_what_has_no_loss_a_token_cannot_be_retained(tmp_path):
    config = config_of(tmp_path)
    config.retention["data"][0]["format"] = "preference"
    with pytest.raises(RequestError, match="'preference' has no loss a token"):
        resolve(config)
    config = config_of(tmp_path, objective={"name": "reward"})
    for section in ("train", "eval"):
        config.data[section][0]["format"] = "preference"
    config.model.tokenizer = "TOKENIZER_DIR"
    with pytest.raises(RequestError, match="a reward model has no logits"):
        resolve(config)


@pytest.mark.parametrize("peft", ["full", "prompt"])
def test_the_kl_needs_a_base_that_stays(tmp_path, peft):
    with pytest.raises(RequestError, match=r"retention\.kl: needs a base that stays"):
        build(resolve(config_of(tmp_path, peft, retention={"kl": 0.5})))
