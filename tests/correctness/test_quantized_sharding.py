"""Quantised weights on eight host devices: one device's losses, and a part of the bytes on each."""

from __future__ import annotations

import dataclasses
import functools
import math
import re

import jax
import numpy as np
import pytest

from jaxtune.core.tree import flatten
from jaxtune.models.config import Experts
from jaxtune.parallel.batches import global_batch
from jaxtune.parallel.mesh import make_mesh
from jaxtune.peft.lora import Lora
from tests.correctness.small import (
    CONFIG,
    Small,
    assert_same_gradients,
    batch_of,
    compiled_gradients,
    examples,
    small,
)

pytestmark = pytest.mark.slow

DENSE = dataclasses.replace(
    CONFIG, hidden_size=512, intermediate_size=1024, head_dim=64, num_heads=8, num_kv_heads=8
)
# Two blocks along D and three along the experts' width: some axes divide both, one or none.
MOE = dataclasses.replace(
    CONFIG, hidden_size=128, intermediate_size=192, head_dim=32, experts=Experts(4, 2)
)
MODELS = {"dense": (DENSE, Lora(rank=3)), "routed": (MOE, Lora(rank=3, targets=("q_proj",)))}
AXES = ("data", "fsdp", "tensor")
CASES = [
    ("dense", (1, 8, 1)),
    ("dense", (2, 2, 2)),
    ("routed", (1, 2, 1)),
    ("routed", (2, 2, 2)),
]
LENGTHS = (5, 19, 2, 11, 7, 41, 30, 8)


@functools.cache
def model_on(name: str, sizes: tuple[int, ...]) -> Small:
    config, method = MODELS[name]
    mesh = make_mesh(dict(zip(AXES, sizes, strict=True)))
    return small(method, dataclasses.replace(config, quantize="nf4"), mesh)


def batch(method):
    return batch_of(method, [[example] for example in examples(LENGTHS)])


@functools.cache
def gradients(name: str, sizes: tuple[int, ...]):
    model = model_on(name, sizes)
    return model.gradients(batch(model.method))


@pytest.mark.parametrize(("name", "sizes"), CASES, ids=str)
def test_meshes_give_one_devices_loss_and_gradients(name, sizes):
    assert_same_gradients(gradients(name, sizes), gradients(name, (1, 1, 1)), 1e-5)
    held = {p: a for p, a in flatten(model_on(name, sizes).params).items() if "/kernel/" in p}
    assert len(held) == 14
    if name == "dense":  # every width divides: an eighth of each leaf, but for the copies of data
        for path, leaf in held.items():
            part = leaf.addressable_shards[0].data
            assert part.nbytes * 8 == leaf.nbytes * sizes[0], path


def test_codes_and_not_weights_travel_along_fsdp():
    model = model_on("dense", (1, 8, 1))
    trainable, frozen = model.parts.split(model.params)
    run = compiled_gradients(model.method, model.parts.config, model.mesh, 1)
    with jax.set_mesh(model.mesh):
        given = global_batch(batch(model.method), model.mesh)
        text = run.lower(trainable, frozen, given).compile().as_text()
    found = re.findall(r"= (\w+)\[([\d,]+)\]\S* all-gather\(", text)
    kernels = [dtype for dtype, shape in found if math.prod(map(int, shape.split(","))) > 2**16]
    assert len(kernels) >= 14 and set(kernels) == {"u8"}


def test_what_lies_where_is_what_the_rules_say():
    mesh = make_mesh({"fsdp": 4, "tensor": 2})
    model = small(Lora(rank=3), dataclasses.replace(DENSE, quantize="nf4"), mesh)
    leaves = flatten(model.params)
    parts = {
        "blocks/mlp/up_proj/kernel/codes": (2, 256 // 4, 1024 // 2),
        "blocks/mlp/up_proj/kernel/absmax": (2, 8 // 4, 1024 // 2),
        "blocks/mlp/down_proj/kernel/codes": (2, 512 // 2, 512 // 4),
        "blocks/mlp/down_proj/kernel/absmax": (2, 16 // 2, 512 // 4),
    }
    for path, shape in parts.items():
        assert leaves[path].addressable_shards[0].data.shape == shape, path
    assert np.dtype(leaves["blocks/mlp/up_proj/kernel/codes"].dtype) == np.uint8
