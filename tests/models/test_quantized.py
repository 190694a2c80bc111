"""A quantised model computes what the plain model computes with the weights that it stands for."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune.core.errors import RequestError
from jaxtune.core.quantize import dense_tree
from jaxtune.core.tree import flatten, nbytes, unflatten, without_holes
from jaxtune.models import decoder
from jaxtune.models.config import Experts
from jaxtune.models.presets import preset
from jaxtune.peft.lora import Lora
from jaxtune.recipes.assemble import plan_parts
from tests.correctness.small import (
    CONFIG,
    METHODS,
    Small,
    assert_same_gradients,
    batch_of,
    examples,
    one_device,
    small,
    training,
)

pytestmark = pytest.mark.slow

# Two blocks of inputs in most layers, three in the last of each block.
WIDE = dataclasses.replace(CONFIG, hidden_size=128, intermediate_size=192, head_dim=32)
MOE = dataclasses.replace(WIDE, experts=Experts(4, 2))
CONFIGS = {"dense": WIDE, "routed": MOE}
ATTENTION = Lora(rank=3, targets=("q_proj", "o_proj"))
CASES = [
    ("dense", METHODS["lora"], "int8"),
    pytest.param("dense", METHODS["lora"], "nf4", marks=pytest.mark.smoke),
    ("dense", METHODS["dora"], "nf4"),
    ("routed", ATTENTION, "nf4"),
]


def plain(model: Small) -> Small:
    """The same model with whole kernels."""
    config = model.parts.config.unquantized
    parts = plan_parts(config, model.method, model.mesh)
    whole = flatten(dense_tree(model.params, jnp.float32))
    params = unflatten({path: whole[path] for path in flatten(parts.shapes)})
    return Small(model.method, parts, params, model.mesh)


@pytest.mark.parametrize(("name", "method", "kind"), CASES, ids=range(4))
def test_loss_and_gradients_equal_the_plain_models(name, method, kind):
    model = small(method, dataclasses.replace(CONFIGS[name], quantize=kind))
    batch = batch_of(method, [[e] for e in examples([5, 19, 2, 41])])
    ours, theirs = model.gradients(batch), plain(model).gradients(batch)
    assert len(ours[2]) > 3 and all(np.abs(grad).max() > 0 for grad in ours[2].values())
    assert_same_gradients(ours, theirs, 1e-6)


def test_a_step_moves_the_adapter_and_no_bit_of_the_codes():
    run = training(small("lora", dataclasses.replace(WIDE, quantize="nf4")))
    before = [without_holes(jax.device_get(tree)) for tree in (run.state.trainable, run.frozen)]
    rows = run.run([batch_of(METHODS["lora"], [[e] for e in examples([5, 19, 2, 41])])] * 2)
    assert rows[1]["loss"] < rows[0]["loss"]
    moved, kept = (without_holes(tree) for tree in (run.state.trainable, run.frozen))
    assert all(np.any(np.asarray(leaf) != before[0][path]) for path, leaf in moved.items())
    codes = [path for path in kept if path.endswith("/codes")]
    assert len(codes) == 7
    assert all(np.asarray(kept[path]).tobytes() == before[1][path].tobytes() for path in kept)


def test_a_quantised_model_differs_from_the_whole_one():
    """The comparison above is not one of a model with itself."""
    batch = batch_of(METHODS["lora"], [[e] for e in examples([5, 19, 2, 41])])
    losses = [
        small("lora", dataclasses.replace(WIDE, quantize=kind)).gradients(batch)[0]
        for kind in ("none", "int8", "nf4")
    ]
    assert 1e-6 < abs(losses[1] / losses[0] - 1) < abs(losses[2] / losses[0] - 1) < 0.1


@pytest.mark.parametrize(
    ("kind", "size", "remat"), [("int8", 1.0, "none"), ("nf4", 0.5, "none"), ("nf4", 0.5, "block")]
)
def test_what_a_step_holds_is_the_codes_and_one_layers_weights(kind, size, remat):
    layers = 24
    config = dataclasses.replace(
        preset("tiny-1m"), vocab_size=16, num_layers=layers, quantize=kind, remat=remat
    )
    method = Lora(rank=2, targets=("q_proj",))
    shapes = flatten(plan_parts(config, method, one_device()).shapes)
    lora = {path: leaf for path, leaf in shapes.items() if "/lora/" in path}
    frozen = {path: leaf for path, leaf in shapes.items() if path not in lora}
    ids = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    batch = {"input_ids": ids, "segment_ids": ids, "positions": ids}

    def loss(lora, frozen, batch):
        params = unflatten(frozen | lora)
        return decoder.hidden_states(config, method, params, batch).states.sum()

    made = jax.jit(jax.grad(loss)).lower(lora, frozen, batch).compile().memory_analysis()
    weights = layers * (128 * (128 + 64 + 64 + 128) + 3 * 128 * 448)
    codes = {path: leaf for path, leaf in frozen.items() if path.endswith("/codes")}
    assert len(codes) == 7 and nbytes(codes) == size * weights
    assert made.argument_size_in_bytes == nbytes(frozen) + nbytes(lora) + nbytes(batch)
    assert nbytes(frozen) < 1.05 * (size + 1 / 32) * weights
    # The kernels of all layers in bfloat16, as they would be if they were kept, are 2 bytes each.
    assert made.temp_size_in_bytes < 0.5 * 2 * weights


def test_trained_kernels_and_pissa_are_refused():
    config = dataclasses.replace(WIDE, quantize="nf4")
    for method, key in (
        (METHODS["full"], "peft.method"),
        (Lora(train=(".*/up_proj/kernel",), targets=("q_proj",)), "peft.train"),
    ):
        with pytest.raises(RequestError, match=r"kernel' would be trained.*nf4") as error:
            plan_parts(config, method, one_device())
        assert error.value.key == key
    norms = Lora(train=(".*norm/scale",))
    assert plan_parts(config, norms, one_device()).counts()["trainable"] > 0
    pissa = small("pissa", config)
    with pytest.raises(RequestError, match="whole weights") as error:
        pissa.method.start(pissa.params, jax.random.key(0), None)
    assert error.value.key == "peft.variant"


def test_counts_are_those_of_the_weights():
    counts = [
        plan_parts(dataclasses.replace(MOE, quantize=kind), METHODS["lora"], one_device()).counts()
        for kind in ("none", "int8", "nf4")
    ]
    assert counts[0] == counts[1] == counts[2]
