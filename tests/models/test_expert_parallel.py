"""Experts spread over devices give what one device gives, and none of them gathers all experts."""

from __future__ import annotations

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxtune.core.tree import flatten, unflatten
from jaxtune.models import functional
from jaxtune.models.config import Experts
from jaxtune.models.experts import AXES, ExpertMlp
from jaxtune.parallel import rules
from jaxtune.parallel.mesh import make_mesh
from jaxtune.parallel.rules import batch_sharding, shardings
from jaxtune.peft.lora import Lora
from jaxtune.peft.method import Method
from jaxtune.planning.collectives import collectives
from jaxtune.planning.hlo import parse
from tests.correctness.small import CONFIG

pytestmark = pytest.mark.slow

EXPERTS, WIDTH, INNER = 8, CONFIG.hidden_size, CONFIG.intermediate_size
CONFIG_MOE = dataclasses.replace(
    CONFIG, experts=Experts(EXPERTS, 2, normalise=False, router_bias=True, bias=True)
)
SPREAD = {"fsdp": 2, "expert": 4}
CUBE = {"fsdp": 2, "tensor": 2, "expert": 2}
PLAIN = Method()
LORA = Lora(rank=3, alpha=6.0, targets="blocks/mlp/.*")


@functools.cache
def structure(width: int = WIDTH, inner: int = INNER, method: Method = PLAIN):
    config = dataclasses.replace(CONFIG_MOE, hidden_size=width, intermediate_size=inner)
    layer = nnx.eval_shape(lambda: ExpertMlp(config, method, nnx.Rngs(0), 0.1))
    return functional.split(layer)


@functools.cache
def weights(
    favourites: tuple[int, ...] = (),
    width: int = WIDTH,
    inner: int = INNER,
    method: Method = PLAIN,
):
    """Random weights; the router adds 9 to the scores of the favourites."""
    rng = np.random.default_rng(3)
    params = {
        path: jnp.asarray(0.3 * rng.standard_normal(leaf.shape), jnp.float32)
        for path, leaf in flatten(structure(width, inner, method)[1]).items()
    }
    for expert in favourites:
        params["router/bias"] = params["router/bias"].at[expert].add(9.0)
    return unflatten(params)


def tokens(rows: int, width: int = WIDTH) -> np.ndarray:
    return np.random.default_rng(rows).standard_normal((rows, 5, width)).astype(np.float32)


def loss(params, x):
    """A number that every output, gate and probability moves."""
    up = params["experts"]["up_proj"]
    method = LORA if "lora" in up else PLAIN
    y, routing = functional.merge(structure(*up["kernel"].shape[1:], method)[0], params)(x)
    weight = jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape)
    return jnp.sum(weight * y**2) + jnp.sum(jnp.square(routing.probabilities)), (y, routing)


def compiled(sizes: dict[str, int], params, x):
    """(the program, its arguments) of the loss with its derivatives in weights and tokens."""
    mesh = make_mesh(sizes)
    names = {path: path.removeprefix("experts/").split("/") for path in flatten(params)}
    axes = {path: AXES[name[0]][name[-1]] for path, name in names.items()}
    params = jax.device_put(params, shardings(unflatten(axes), params, mesh))
    if x.shape[0] % mesh.size == 0:
        x = jax.device_put(x, batch_sharding(mesh))
    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    with jax.set_mesh(mesh):
        return run.lower(params, x).compile(), (params, x)


def results(sizes, params, x):
    return run(*compiled(sizes, params, x))


def run(program, arguments):
    (value, (y, routing)), (grads, dx) = program(*arguments)
    return {"loss": value, "y": y, "dx": dx, "chosen": routing.chosen} | flatten(grads)


@pytest.mark.parametrize(
    ("sizes", "rows", "favourites", "method"),
    [
        (SPREAD, 8, (), PLAIN),
        (CUBE, 8, (2,), PLAIN),
        (SPREAD, 8, (6, 7), PLAIN),  # one device has all of the work, several even shares
        (SPREAD, 2, (), PLAIN),  # rows on fsdp, the same on each of the experts' devices
        (CUBE, 1, (0,), PLAIN),  # a single prompt: weights stay where they are
        ({"expert": 3}, 3, (), PLAIN),  # 3 does not divide 8 experts
        ({"fsdp": 2, "expert": 2}, 4, (), LORA),
        (CUBE, 8, (2,), LORA),
        ({"fsdp": 2, "tensor": 2}, 4, (), LORA),
    ],
    ids=str,
)
def test_outputs_and_gradients_are_those_of_one_device(sizes, rows, favourites, method):
    """C37: every token goes to all of its experts, wherever they are."""
    params, x = weights(favourites, method=method), tokens(rows)
    assert ("experts/up_proj/lora/b" in flatten(params)) == (method == LORA)
    theirs, ours = results({}, params, x), results(sizes, params, x)
    for expert in favourites:
        assert (np.asarray(theirs["chosen"]) == expert).any(axis=-1).all()
    for name, value in theirs.items():
        scale = np.abs(value).max()
        np.testing.assert_allclose(ours[name], value, atol=1e-5 * scale, err_msg=name)


@pytest.mark.parametrize(
    ("width", "inner", "part"),
    [(33, INNER, (4, 33, INNER // 4)), (WIDTH, 45, (4, WIDTH // 4, 45))],
)
@pytest.mark.parametrize("rows", [8, 1])
def test_a_width_that_does_not_divide_is_split_otherwise(width, inner, part, rows, monkeypatch):
    """`fsdp` takes a part of the inner width, or `tensor` one of the tokens' width."""
    monkeypatch.setattr(rules, "LARGE", 64)
    params, x = weights((), width, inner), tokens(rows, width)
    program, arguments = compiled(CUBE, params, x)
    kernel = arguments[0]["experts"]["up_proj"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == part
    theirs, ours = results({}, params, x), run(program, arguments)
    for name, value in theirs.items():
        scale = np.abs(value).max()
        np.testing.assert_allclose(ours[name], value, atol=1e-5 * scale, err_msg=name)


def gathered(program) -> set[tuple[int, ...]]:
    """Shapes of collectives' results that are kernels of experts."""
    found = collectives(parse(program.as_text()))
    shapes = {shape for c in found for _, shape in c.shapes}
    kernels = ({WIDTH, INNER}, {WIDTH, INNER // 2})
    return {shape for shape in shapes if len(shape) == 3 and set(shape[1:]) in kernels}


def test_no_device_gathers_more_than_its_own_experts():
    x = tokens(8)
    program, (params, _) = compiled(SPREAD, weights(), x)
    kernel = params["experts"]["up_proj"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (EXPERTS // 4, WIDTH // 2, INNER)
    assert {shape[0] for shape in gathered(program)} == {EXPERTS // 4}
    # What the check would see: along fsdp alone, every device gathers them all.
    assert EXPERTS in {shape[0] for shape in gathered(compiled({"fsdp": 8}, weights(), x)[0])}


def test_experts_that_are_frozen_have_no_gradient_in_the_loop_over_pieces():
    """With LoRA on them, a loop carries each kernel once, and no sum in its shape beside it."""
    mesh, params = make_mesh({"expert": 2}), flatten(weights(method=LORA))
    frozen = {path: leaf for path, leaf in params.items() if "/lora/" not in path}

    def carried(trained):
        def run(trained, x):
            return loss(unflatten(params | trained), x)[0]

        with jax.set_mesh(mesh):
            text = jax.jit(jax.grad(run)).lower(trained, tokens(4)).compile().as_text()
        kernel = rf"f32\[{EXPERTS // 2},(?:{WIDTH},{INNER}|{INNER},{WIDTH})\]"
        loops = re.findall(r"= \((.*)\) while\(", text)
        return max(len(re.findall(kernel, loop)) for loop in loops)

    assert carried({path: params[path] for path in params if path not in frozen}) == 3
    assert carried(frozen) == 6  # what the check would see


def test_for_few_rows_no_weight_is_gathered_at_all():
    assert gathered(compiled({"fsdp": 4, "expert": 2}, weights(), tokens(1))[0]) == set()
