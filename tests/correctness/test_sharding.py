"""On eight host devices every mesh gives one device's losses and gradients, and nothing is held
twice.
"""

from __future__ import annotations

import dataclasses
import functools
import re

import jax
import numpy as np
import pytest

from jaxtune.core.tree import flatten, without_holes
from jaxtune.parallel import rules
from jaxtune.parallel.mesh import make_mesh
from jaxtune.parallel.rules import batch_sharding
from jaxtune.planning.collectives import KINDS, collectives
from jaxtune.planning.hlo import parse
from jaxtune.training.compile import abstract_batch
from tests.correctness.small import CONFIG, batch_of, examples, small, training

pytestmark = pytest.mark.slow

EVEN = dataclasses.replace(CONFIG, vocab_size=96)  # 8 devices divide every width
AXES = ("data", "fsdp", "tensor", "expert")
ALONE = ((8, 1, 1, 1), (1, 8, 1, 1), (1, 1, 8, 1))
PAIRS = ((2, 4, 1, 1), (4, 1, 2, 1), (1, 2, 4, 1), (1, 2, 2, 2))
CUBE = (2, 2, 2, 1)
CASES = [
    *(("full", sizes) for sizes in (*ALONE, (1, 1, 1, 8), *PAIRS, CUBE)),
    *(("lora", sizes) for sizes in (*ALONE, (1, 2, 4, 1), CUBE)),
    *(("prompt", sizes) for sizes in (*ALONE[1:], CUBE)),
    ("full", (1, 2, 2, 1)),
    ("lora", (2, 1, 1, 1)),
]
# Which mesh axis splits each dimension, written down here once more; `expert` goes with `fsdp` in
# a model without experts.
LAYOUT = (
    (r"embed/embedding", ("tensor", "fsdp")),
    (r"lm_head/kernel", ("fsdp", "tensor")),
    (r".*/(q|k|v|gate|up)_proj/kernel", (None, "fsdp", "tensor")),
    (r".*/(o|down)_proj/kernel", (None, "tensor", "fsdp")),
    (r".*/(q|k|v|gate|up)_proj/lora/a", (None, "fsdp", None)),
    (r".*/(q|k|v|gate|up)_proj/lora/b", (None, None, "tensor")),
    (r".*/(o|down)_proj/lora/a", (None, "tensor", None)),
    (r".*/(o|down)_proj/lora/b", (None, None, "fsdp")),
    (r"blocks/(attn|mlp)_norm/scale", (None, "fsdp")),
    (r"final_norm/scale", ("fsdp",)),
    (r"prompt/embedding", (None, "fsdp")),
)


def batches(method):
    return [
        batch_of(method, [[e] for e in examples([5, 19, 2, 11, 7, 41], seed=s)]) for s in (0, 1)
    ]


def trained(name: str, sizes: tuple[int, ...]):
    """(Training after two steps, its metrics, the first step's gradients)."""
    mesh = make_mesh(dict(zip(AXES, sizes, strict=True)))
    run = training(small(name, EVEN, mesh))
    first, second = batches(run.model.method)
    rows = run.run([first])
    # After one step Adam's first moment is the gradient, clipped, times 1 - b1.
    grads = {path: np.asarray(leaf) for path, leaf in without_holes(moments(run).mu).items()}
    return run, rows + run.run([second]), grads


def moments(run):
    """Adam's state."""
    leaves = jax.tree.leaves(run.state.opt_state, is_leaf=lambda node: hasattr(node, "mu"))
    [found] = [leaf for leaf in leaves if hasattr(leaf, "mu")]
    return found


@functools.cache
def one_device(name: str):
    run, rows, grads = trained(name, (1, 1, 1, 1))
    return {p: np.asarray(a) for p, a in without_holes(run.state.trainable).items()}, rows, grads


def expected_shape(path: str, shape: tuple[int, ...], sizes: dict[str, int]) -> tuple[int, ...]:
    """The shape of one device's part."""
    axes = next(axes for regex, axes in LAYOUT if re.fullmatch(regex, path))
    sizes = sizes | {"fsdp": sizes.get("fsdp", 1) * sizes.get("expert", 1)}
    return tuple(n // sizes.get(axis, 1) for n, axis in zip(shape, axes, strict=True))


def assert_shared(tree, sizes: dict[str, int]) -> int:
    """Checks the part of each leaf on each device, and returns the bytes on one device."""
    total = 0
    for path, leaf in without_holes(tree).items():
        part = expected_shape(path, leaf.shape, sizes)
        assert len(leaf.addressable_shards) == np.prod(list(sizes.values()))
        for shard in leaf.addressable_shards:
            assert shard.data.shape == part, path
        total += leaf.addressable_shards[0].data.nbytes
    return total


@pytest.mark.parametrize(("name", "sizes"), CASES, ids=lambda v: str(v).replace(" ", ""))
def test_losses_equal_one_devices_and_state_is_spread(name, sizes):
    params, expected, gradients = one_device(name)
    run, rows, grads = trained(name, sizes)
    for path, leaf in gradients.items():
        scale = np.abs(leaf).max()
        np.testing.assert_allclose(grads[path], leaf, rtol=1e-5, atol=1e-5 * scale, err_msg=path)
    for ours, theirs in zip(rows, expected, strict=True):
        for key in ("loss", "grad_norm", "accuracy"):
            np.testing.assert_allclose(ours[key], theirs[key], rtol=1e-5, err_msg=key)
        for key in ("tokens", "trained_tokens", "learning_rate"):
            assert ours[key] == theirs[key]
    # Adam divides by the root of a gradient's square, so that tiny gradients move much
    for path, leaf in without_holes(run.state.trainable).items():
        np.testing.assert_allclose(leaf, params[path], atol=2e-3, err_msg=path)

    named = dict(zip(AXES, sizes, strict=True))
    held = assert_shared(run.state.trainable, named)
    assert_shared(run.frozen, named)
    adam = moments(run)
    assert assert_shared(adam.mu, named) == assert_shared(adam.nu, named) == held
    # Everything together, and not only each part: what one device holds of the optimizer state is
    # two moments of its share and some scalars.
    state = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(run.state.opt_state))
    assert 2 * held <= state <= 2 * held + 64
    if name == "full" and sizes[0] == 1:
        whole = sum(leaf.nbytes for leaf in params.values())
        norms = sum(leaf.nbytes for path, leaf in params.items() if path.endswith("scale"))
        assert held <= whole / np.prod(sizes) + norms


@pytest.mark.parametrize("large", [2**18, 64])
def test_what_does_not_divide_is_whole_or_split_otherwise_and_trains(large, monkeypatch):
    """A vocabulary of 97 rows on a tensor axis of 2."""
    monkeypatch.setattr(rules, "LARGE", large)
    mesh = make_mesh({"fsdp": 2, "tensor": 2})
    run = training(small("full", CONFIG, mesh))
    for path in ("embed/embedding", "lm_head/kernel"):
        table = flatten(run.state.trainable)[path]
        part = table.addressable_shards[0].data.size
        assert part == table.size // (2 if large > 64 else 4)
    rows = batches(run.model.method)
    for ours, theirs in zip(run.run(rows), training(small("full", CONFIG)).run(rows), strict=True):
        np.testing.assert_allclose(ours["loss"], theirs["loss"], rtol=1e-5)


def compiled_for_few_tokens(run, mesh) -> str:
    """The step's program for four rows of four tokens."""
    kinds = {name: np.dtype(array.dtype) for name, array in batches(run.model.method)[0].items()}
    few = abstract_batch(4, 4, kinds, batch_sharding(mesh))
    with jax.set_mesh(mesh):
        return run.step.lower(run.state, run.frozen, few).compile().as_text()


def test_what_is_split_otherwise_is_computed_as_ever(monkeypatch):
    """The head's rows lie on several devices along `tensor`; logits are still no sum over them, and
    hidden states do not lie on several, to be gathered before every product.
    """
    monkeypatch.setattr(rules, "LARGE", 64)
    mesh = make_mesh({"fsdp": 4, "tensor": 2})
    text = compiled_for_few_tokens(training(small("full", CONFIG, mesh)), mesh)
    found = [c for c in collectives(parse(text)) if c.group == 2]  # neighbours along `tensor`
    shapes = {kind: {d for c in found if c.kind == kind for _, d in c.shapes} for kind in KINDS}
    assert (1, 4, 32) in shapes["all-reduce"]  # the sum behind a row-split product
    assert (1, 4, 97) not in shapes["all-reduce"]
    assert (1, 4, 32) not in shapes["all-gather"]


def test_gradients_that_are_added_up_lie_as_their_parameters():
    """What the loop over micro-batches carries."""
    mesh = make_mesh({"fsdp": 2, "tensor": 2})
    run = training(small("lora", EVEN, mesh), grad_accum=2)
    text = compiled_for_few_tokens(run, mesh)
    loops = re.findall(r"= (\(.*?\)) while\(", text)
    carried = {shape for loop in loops for shape in re.findall(r"f32\[([\d,]+)\]", loop)}
    leaves = without_holes(run.state.trainable).values()
    parts = {",".join(map(str, leaf.addressable_shards[0].data.shape)) for leaf in leaves}
    wholes = {",".join(map(str, leaf.shape)) for leaf in leaves} - parts
    assert parts <= carried and wholes and not wholes & carried


def test_micro_batches_on_a_mesh_equal_one_batch_on_one_device():
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    run = training(small("lora", EVEN, mesh), grad_accum=2)
    _, expected, _ = one_device("lora")
    for ours, theirs in zip(run.run(batches(run.model.method)), expected, strict=True):
        for key in ("loss", "grad_norm", "trained_tokens"):
            np.testing.assert_allclose(ours[key], theirs[key], rtol=1e-5, err_msg=key)
