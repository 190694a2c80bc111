"""C11, C36 and C37 for every back end that runs here: whole models against the dense form."""

from __future__ import annotations

import dataclasses
import functools
import re

import jax
import numpy as np
import pytest
from jax.interpreters.partial_eval import dce_jaxpr

from jaxtune.models.config import LayerKind
from jaxtune.models.decoder import hidden_states
from jaxtune.parallel.batches import global_batch
from jaxtune.parallel.mesh import make_mesh
from tests.correctness.small import (
    CONFIG,
    METHODS,
    assert_same_gradients,
    batch_of,
    examples,
    small,
)

pytestmark = pytest.mark.slow

# Two kinds of layers, one with a window far shorter than a row
CONFIGS = {
    name: dataclasses.replace(
        CONFIG,
        vocab_size=96,
        max_position_embeddings=128,
        kinds=(LayerKind(window=9), LayerKind()),
        pattern=(0, 1),
        attention_softcap=3.0,
        attention=name,
    )
    for name in ("xla", "splash_interpreted", "ring")
}
MESHES = {
    "splash_interpreted": ({"data": 1}, {"fsdp": 2, "tensor": 2}),
    "ring": ({"data": 1}, {"sequence": 4}),
}
CASES = [(name, sizes) for name, meshes in MESHES.items() for sizes in meshes]
TOGETHER, APART = [[21, 60], [40], [7, 30, 11]], [[21], [60], [40], [7], [30], [11]]


def batch(rows, seed: int = 3):
    """Rows of examples of these lengths; the same order of lengths gives the same tokens."""
    known = iter(examples([n for row in rows for n in row], seed, 96))
    return batch_of(METHODS["full"], [[next(known) for _ in row] for row in rows], 128)


@functools.cache
def dense():
    return small("full", CONFIGS["xla"]).gradients(batch(TOGETHER))


@pytest.mark.parametrize(("name", "sizes"), CASES, ids=str)
def test_c36_c37_windows_and_meshes_equal_the_dense_form(name, sizes):
    model = small("full", CONFIGS[name], make_mesh(sizes))
    assert_same_gradients(model.gradients(batch(TOGETHER)), dense(), 1e-5)


@pytest.mark.parametrize(("name", "sizes"), CASES, ids=str)
def test_c11_packed_examples_equal_separate_ones(name, sizes):
    model = small("full", CONFIGS[name], make_mesh(sizes))
    together, apart = model.gradients(batch(TOGETHER)), model.gradients(batch(APART))
    assert_same_gradients(together, apart)


@pytest.mark.parametrize(("name", "sizes"), CASES, ids=str)
def test_c11_a_neighbour_changes_no_bit(name, sizes):
    model = small("full", CONFIGS[name], make_mesh(sizes))
    first = batch(TOGETHER)
    other = {key: array.copy() for key, array in first.items()}
    other["input_ids"][0, :21] = 5  # the first example of a row that holds two
    run = jax.jit(functools.partial(hidden_states, CONFIGS[name], model.method, model.params))
    with jax.set_mesh(model.mesh):
        left, right = (np.asarray(run(global_batch(b, model.mesh)).states) for b in (first, other))
    assert np.any(left[0, :21] != right[0, :21])
    np.testing.assert_array_equal(left[0, 21:81], right[0, 21:81])
    np.testing.assert_array_equal(left[1:], right[1:])


@pytest.mark.parametrize(("remat", "times"), [("none", 1), ("dots", 1), ("block", 2)])
def test_remat_of_dots_does_not_run_the_kernel_again(remat, times):
    config = CONFIGS["splash_interpreted"]
    config = dataclasses.replace(config, kinds=(LayerKind(),), pattern=(0,), remat=remat)
    model = small("full", config)
    one = batch(TOGETHER)

    def loss(trainable):
        return model.loss(trainable, model.parts.split(model.params)[1], one, None)[0].sum

    program = jax.make_jaxpr(jax.grad(loss))(model.parts.split(model.params)[0]).jaxpr
    used, _ = dce_jaxpr(program, [True] * len(program.outvars))
    assert len(re.findall(r"name=splash_mha_fwd\w*", str(used))) == times
