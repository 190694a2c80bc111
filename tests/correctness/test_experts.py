"""Training a model with routed experts: meshes, micro-batches, optimizers, memory, the balance."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune.core.quantize import dense_tree
from jaxtune.core.tree import flatten, unflatten, without_holes
from jaxtune.models.config import Experts
from jaxtune.models.decoder import init_params
from jaxtune.optim.transform import OptimSpec, core
from jaxtune.parallel.batches import global_batch
from jaxtune.parallel.mesh import batch_shards, make_mesh
from jaxtune.peft.full import Full
from jaxtune.peft.lora import Lora
from jaxtune.peft.prompt import Prompt
from jaxtune.recipes.sft import sft_loss
from jaxtune.training.step import summed_gradients
from tests.checkpoints.world import BASE, assert_same_logits, logits_of, probe
from tests.correctness.small import (
    CONFIG,
    Small,
    assert_same_gradients,
    batch_of,
    examples,
    plain,
    small,
    training,
)

pytestmark = pytest.mark.slow

MOE = dataclasses.replace(CONFIG, vocab_size=96, experts=Experts(4, 2, router_bias=True, bias=True))
LORA = Lora(rank=3)
ROUTED = Lora(rank=3, targets="blocks/.*")  # experts and their router too
AXES = ("data", "fsdp", "tensor", "expert")
CASES = [
    *(("full", sizes) for sizes in ((8, 1, 1, 1), (1, 8, 1, 1), (1, 1, 2, 1), (1, 1, 1, 4))),
    *(("full", sizes) for sizes in ((2, 1, 1, 4), (1, 2, 2, 2))),
    *(("lora", sizes) for sizes in ((1, 2, 1, 4), (2, 2, 2, 1))),
    ("prompt", (1, 2, 2, 2)),
    ("routed", (1, 2, 1, 2)),
]
METHODS = {"full": Full(), "lora": LORA, "routed": ROUTED, "prompt": Prompt(num_tokens=3)}
BALANCE = 0.3
LENGTHS = (5, 19, 2, 11, 7, 41, 30, 8)


def batch(method):
    return batch_of(method, [[example] for example in examples(LENGTHS)])


def gradients(method, sizes=(1, 1, 1, 1), count=1, rows=None):
    """(loss sum, weight, {path: gradient}, metrics) with a load-balancing loss."""
    mesh = make_mesh(dict(zip(AXES, sizes, strict=True)))
    model = small(METHODS[method], MOE, mesh)
    loss = sft_loss(MOE, model.method, batch_shards(mesh), BALANCE)
    trainable, frozen = model.parts.split(model.params)
    places = (None, None, model.parts.split(model.parts.shardings)[0])
    key = jax.random.key(0)

    def run(trainable, frozen, batch):
        return plain(summed_gradients(loss, trainable, frozen, batch, key, count))

    with jax.set_mesh(mesh):
        given = global_batch(batch(model.method) if rows is None else rows, mesh)
        total, metrics, grads = jax.jit(run, out_shardings=places)(trainable, frozen, given)
    flat = {path: np.asarray(grad) for path, grad in without_holes(grads).items()}
    return (float(total.sum), float(total.weight), flat), metrics


@functools.cache
def one_device(method):
    return gradients(method)


@pytest.mark.parametrize(("method", "sizes"), CASES, ids=str)
def test_meshes_give_one_devices_loss_and_gradients(method, sizes):
    """C2."""
    (theirs, expected) = one_device(method)
    ours, metrics = gradients(method, sizes)
    assert_same_gradients(ours, theirs, 1e-5)
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name].mean(), value.mean(), rtol=1e-5, err_msg=name)
    if method == "routed":
        assert all("/lora/" in path for path in ours[2])
        paths = [path for path in ours[2] if "/experts/" in path or "/router/" in path]
        assert len(paths) == 8
        assert all(np.abs(ours[2][path]).max() > 0 for path in paths)
    if method == "full":
        paths = [path for path in ours[2] if "/experts/" in path or "/router/" in path]
        assert len(paths) == 8
        assert all(np.abs(ours[2][path]).max() > 0 for path in paths)


def test_micro_batches_and_the_order_of_rows_change_nothing():
    """C1, C2: the balance included."""
    whole, _ = one_device("full")
    assert_same_gradients(gradients("full", count=4)[0], whole, 1e-5)
    swapped = {name: value[::-1].copy() for name, value in batch(small("full", MOE).method).items()}
    assert_same_gradients(gradients("full", rows=swapped)[0], whole, 1e-5)


def test_the_balance_is_a_metric_and_its_coefficient_adds_it_to_the_loss():
    model = small("full", MOE)
    trainable, frozen = model.parts.split(model.params)
    given = batch(model.method)

    def run(coefficient):
        loss = sft_loss(MOE, model.method, 1, coefficient)
        return jax.jit(lambda t, f, b: loss(t, f, b, None))(trainable, frozen, given)

    (plain, metrics), (more, _) = run(0.0), run(BALANCE)
    uneven = metrics["router_balance"].mean()
    assert uneven > MOE.experts.per_token
    np.testing.assert_allclose(more.mean(), plain.mean() + BALANCE * uneven, rtol=1e-5)


def test_steps_on_a_mesh_equal_one_devices_and_experts_are_spread():
    given = [batch(small("full", MOE).method)] * 2
    run = training(small("full", MOE, make_mesh({"expert": 2, "fsdp": 2, "tensor": 2})))
    kernel = flatten(run.state.trainable)["blocks/mlp/experts/down_proj/kernel"]
    assert kernel.shape == (2, 4, 48, 32)
    assert kernel.addressable_shards[0].data.shape == (2, 2, 24, 16)
    router = flatten(run.state.trainable)["blocks/mlp/router/kernel"]
    assert router.shape == (2, 32, 4) and router.addressable_shards[0].data.shape == (2, 8, 4)
    # A device holds an eighth of everything but what is too small to split in three.
    whole, held = (
        sum(size(leaf) for leaf in jax.tree.leaves(run.state.opt_state))
        for size in (lambda x: x.nbytes, lambda x: x.addressable_shards[0].data.nbytes)
    )
    assert whole / 8 <= held <= 1.05 * whole / 8
    alone = training(small("full", MOE))
    for ours, theirs in zip(run.run(given), alone.run(given), strict=True):
        for name in ("loss", "grad_norm", "router_balance"):
            np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-5, err_msg=name)
        assert ours["unchanged"] == theirs["unchanged"] == 0.0


def test_the_backward_pass_does_not_hold_every_layers_gathered_experts():
    """Frozen experts are gathered along fsdp for a layer's product, and not kept for its
    derivative.
    """
    mesh = make_mesh({"fsdp": 8})

    def temporary(layers: int) -> int:
        experts = Experts(16, 2)
        config = dataclasses.replace(MOE, num_layers=layers, intermediate_size=256, experts=experts)
        model = small(LORA, config, mesh)
        loss = sft_loss(config, LORA, batch_shards(mesh))
        trainable, frozen = model.parts.split(model.params)

        def run(trainable, frozen, batch):
            return plain(summed_gradients(loss, trainable, frozen, batch, jax.random.key(0), 1))

        with jax.set_mesh(mesh):
            placed = global_batch(batch(LORA), mesh)
            compiled = jax.jit(run).lower(trainable, frozen, placed).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    whole = 3 * 16 * 256 * 32 * 4  # bytes of one layer's experts
    assert (temporary(6) - temporary(2)) / 4 < whole / 3


@pytest.mark.parametrize("name", ["adamw", "adafactor", "lion", "sgd", "muon"])
def test_an_optimizer_treats_each_experts_matrix_as_it_would_alone(name):
    """But for adafactor's scale, which is that of a leaf."""
    spec = OptimSpec(name=name, clip_norm=None)
    rng = np.random.default_rng(0)
    value, grad = (jnp.asarray(rng.standard_normal((2, 3, 8, 12)), jnp.float32) for _ in range(2))

    def updated(value, grad):
        params = {"blocks": {"mlp": {"experts": {"up_proj": {"kernel": value}}}}}
        grads = jax.tree.map(lambda _: grad, params)
        rule = core(spec)
        update, _ = rule.update(grads, rule.init(params), params)
        return jax.tree.leaves(update)[0]

    whole = jax.jit(updated)(value, grad)
    assert whole.shape == value.shape and np.abs(whole).min() > 0
    if name == "adafactor":
        return
    for layer, expert in np.ndindex(2, 3):
        alone = jax.jit(updated)(value[layer, expert], grad[layer, expert])
        np.testing.assert_allclose(whole[layer, expert], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["lora", "routed"])
def test_merged_lora_equals_the_adapter_and_what_it_does_not_adapt_stays(name):
    method = METHODS[name]
    model = small(method, MOE)
    merged = flatten(method.merge(model.params))
    base = {path: leaf for path, leaf in flatten(model.params).items() if "/lora/" not in path}
    assert merged.keys() == base.keys()
    for path, leaf in base.items():
        routed = "/experts/" in path or "/router/" in path
        if routed and (name == "lora" or path.endswith("bias")):
            assert np.array_equal(leaf, merged[path])
        elif routed:
            assert not np.array_equal(leaf, merged[path])
    rows = probe(MOE)
    assert_same_logits(
        logits_of(MOE, method, model.params, rows), logits_of(MOE, BASE, unflatten(merged), rows)
    )


def test_lora_on_experts_starts_as_the_base():
    params = flatten(init_params(MOE, ROUTED, jax.random.key(0)))
    added = [path for path in params if "/experts/" in path and path.endswith("/lora/a")]
    assert len(added) == 3 and all(np.abs(params[path]).min() > 0 for path in added)
    base = unflatten({path: leaf for path, leaf in params.items() if "/lora/" not in path})
    ours = logits_of(MOE, ROUTED, unflatten(params), probe(MOE))
    for one, other in zip(ours, logits_of(MOE, BASE, base, probe(MOE)), strict=True):
        np.testing.assert_array_equal(one, other)


def test_lora_on_quantised_experts_equals_that_on_their_dense_values():
    config = dataclasses.replace(MOE, quantize="nf4")
    model = small(ROUTED, config)
    dense = dense_tree(model.params, jnp.float32)
    rows = probe(MOE)
    assert "codes" in model.params["blocks"]["mlp"]["experts"]["up_proj"]["kernel"]
    assert_same_logits(
        logits_of(config, ROUTED, model.params, rows), logits_of(MOE, ROUTED, dense, rows)
    )
    given, trained = batch(ROUTED), Small(ROUTED, small(ROUTED, MOE).parts, dense, model.mesh)
    assert_same_gradients(model.gradients(given), trained.gradients(given), 1e-4)
