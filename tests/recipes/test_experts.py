"""Runs of models with routed experts: the balance, what is counted, and what is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from jaxtune.cli.main import main
from jaxtune.core.errors import RequestError
from jaxtune.core.tree import flatten, unflatten
from jaxtune.models.config import Experts
from jaxtune.models.presets import preset
from jaxtune.peft.lora import Lora
from jaxtune.peft.method import Method
from jaxtune.recipes.adapters import Adapter, sum_of_loras
from jaxtune.recipes.build import build
from jaxtune.recipes.plans.report import step_flops
from jaxtune.recipes.schema.resolve import resolve
from tests.checkpoints.world import CONFIG, random_params
from tests.correctness.tiny_runs import MODEL, rows, run_config

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
LAYERS, D, F = MODEL["num_layers"], MODEL["hidden_size"], MODEL["intermediate_size"]


def config_of(directory: Path, count: int = 4, per_token: int = 2, **changes) -> dict:
    experts = {"count": count, "per_token": per_token}
    return run_config(directory, model__overrides__experts=experts, **changes)


def flops_of(config: dict) -> int:
    return step_flops(build(resolve(config)))


@pytest.mark.slow
def test_a_run_reports_the_balance_and_leaves_it_out_of_the_held_out_loss(tmp_path):
    """The learning rate is next to nothing, so that only the coefficient differs."""
    found = {}
    for balance in (0.0, 0.5):
        config = config_of(
            tmp_path,
            peft={"method": "full"},
            objective={"balance": balance},
            optim={"lr": 1e-9},
            total_steps=2,
            log={"every_steps": 1, "tensorboard": False},
            checkpoint=None,
            eval={"every_steps": 2},
        )
        path, workdir = tmp_path / "config.json", tmp_path / str(balance)
        path.write_text(json.dumps(config))
        assert main(["train", f"--config={path}", f"--workdir={workdir}"]) == 0
        found[balance] = rows(workdir)
    (plain, *_), (more, *_) = found.values()
    assert plain["router_balance"] == more["router_balance"] > 2
    assert more["loss"] == pytest.approx(plain["loss"] + 0.5 * plain["router_balance"], rel=1e-5)
    held = [[row for row in table if "eval/loss" in row][-1] for table in found.values()]
    assert held[0]["eval/loss"] == pytest.approx(held[1]["eval/loss"], rel=1e-5)
    assert held[0]["eval/router_balance"] > 2


def test_a_token_is_counted_with_the_experts_that_compute_it(tmp_path):
    """full: each weight twice backwards and once forwards, two operations each."""
    full = {"method": "full"}
    tokens = 4 * 24
    expert = LAYERS * 3 * D * F * 2 * 3 * tokens
    router = LAYERS * D * 2 * 3 * tokens
    base = flops_of(config_of(tmp_path, 8, 1, peft=full))
    assert flops_of(config_of(tmp_path, 8, 3, peft=full)) == base + 2 * expert
    assert flops_of(config_of(tmp_path, 12, 1, peft=full)) == base + 4 * router
    assert flops_of(run_config(tmp_path, peft=full)) == base - 8 * router


def test_a_model_without_experts_has_nothing_to_balance(tmp_path):
    with pytest.raises(RequestError, match="no experts to balance") as error:
        build(resolve(run_config(tmp_path, objective={"balance": 0.01})))
    assert error.value.key == "objective.balance"
    with pytest.raises(RequestError, match=r"objective\.balance"):
        resolve(run_config(tmp_path, objective={"balance": -1.0}))


def test_only_lora_adapts_experts_and_others_refuse_them_by_name(tmp_path):
    for method in ("ia3", "bitfit"):
        config = config_of(tmp_path, peft={"method": method, "targets": ["q_proj", "down_proj"]})
        with pytest.raises(RequestError, match="'down_proj' is no linear layer of this model"):
            build(resolve(config))
    for dead in ({"variant": "dora"}, {"variant": "pissa"}, {"dropout": 0.1}):
        peft = {"method": "lora", "targets": ["q_proj", "router"], **dead}
        with pytest.raises(RequestError, match="'router'") as error:
            build(resolve(config_of(tmp_path, peft=peft)))
        assert error.value.key == f"peft.{next(iter(dead))}"
    with pytest.raises(RequestError, match=r"'w1' is no linear layer of this model; .* router"):
        build(resolve(config_of(tmp_path, peft={"method": "lora", "targets": ["w1"]})))


def test_what_lora_trains_of_experts(tmp_path):
    """r (in + out) of each matrix, experts apart; all-linear is attention alone."""

    def trained(**peft):
        config = config_of(tmp_path, peft={"method": "lora", "rank": 3, **peft})
        return build(resolve(config)).parts.counts()["trainable"]

    attention = trained(targets=ATTENTION)
    assert trained() == attention
    assert trained(variant="dora") > attention
    up = trained(targets=[*ATTENTION, "up_proj"]) - attention
    assert up == trained(targets=["down_proj"]) == LAYERS * 4 * 3 * (D + F)
    assert trained(targets="blocks/mlp/router") == LAYERS * 3 * (D + 4)


def test_the_preset_routes_to_8_of_128_experts():
    config = preset("qwen3-30b-a3b")
    assert (config.experts.count, config.experts.per_token, config.vocab_size) == (128, 8, 151936)


def test_a_weighted_sum_of_loras_on_experts_is_that_of_their_products():
    config = dataclasses.replace(CONFIG, experts=Experts(4, 2))
    methods = {
        0.5: Lora(rank=2, targets=("up_proj", "router")),
        -2.0: Lora(rank=3, targets=("up_proj", "q_proj"), per_layer=True),
    }
    base = flatten(random_params(config, Method()))
    expected, parts = dict(base), []
    for weight, method in methods.items():
        leaves = flatten(random_params(config, method, seed=method.rank))
        leaves = {path: leaf for path, leaf in leaves.items() if "/lora/" in path}
        parts.append((Adapter(method, leaves), weight))
        merged = flatten(method.merge(unflatten(base | leaves)))
        for path in base:
            expected[path] += weight * (merged[path] - base[path])
    method, leaves = sum_of_loras(parts, base)
    found = flatten(method.merge(unflatten(base | leaves)))
    changed = [path for path in base if not np.array_equal(found[path], base[path])]
    assert sorted(path.split("/")[-2] for path in changed) == ["q_proj", "router", "up_proj"]
    for path, leaf in expected.items():
        np.testing.assert_allclose(found[path], leaf, rtol=1e-5, atol=1e-5, err_msg=path)
