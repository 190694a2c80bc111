"""Logical axes become layouts."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from jaxtune.core.tree import flatten
from jaxtune.models.decoder import abstract_params, param_axes
from jaxtune.parallel.mesh import AXES, make_mesh
from jaxtune.parallel.rules import (
    RULES,
    SPARE,
    constrain,
    shardings,
    spec,
    state_shardings,
    stored_spec,
)
from jaxtune.peft.lora import Lora
from jaxtune.peft.registry import METHODS
from tests.checkpoints.world import CONFIG

CUBE = {"data": 2, "fsdp": 2, "tensor": 2}
ROUTED = {"fsdp": 2, "tensor": 2, "expert": 2}
KV = P(None, ("data", "fsdp"), None, None, "tensor")


@pytest.mark.parametrize(
    ("axes", "shape", "expected"),
    [
        (("embed", "mlp"), (4, 6), P("fsdp", "tensor")),
        (("layers", "heads", "embed"), (3, 8, 4), P(None, "tensor", "fsdp")),
        (("vocab", "embed"), (61, 4), P(None, "fsdp")),  # 61 is odd: it stays whole
        (("batch", None), (8, 5), P(("data", "fsdp"), None)),
        (("batch",), (6,), P("data")),  # as far as it goes
        (("layers", "batch", None, "kv_heads", "head"), (3, 8, 5, 1, 6), KV),
        ((None,), (4,), P(None)),
    ],
)
def test_a_dimension_is_split_where_its_axis_divides_it(axes, shape, expected):
    assert spec(axes, shape, make_mesh(CUBE)) == expected


@pytest.mark.parametrize(
    ("axes", "shape", "expected"),
    [
        # GPT-2's vocabulary is odd: `tensor` takes what it can.
        (("vocab", "embed"), (50257, 768), P(None, ("expert", "fsdp", "tensor"))),
        (("embed", "vocab"), (768, 50257), P(("expert", "fsdp", "tensor"), None)),
        (("vocab", "embed"), (5027, 12), P(None, ("expert", "fsdp"))),  # too small to matter
        # LoRA's B of a large rank, a layer at a time.
        (("layers", None, "heads"), (2, 512, 4096), P(None, None, ("tensor", "expert", "fsdp"))),
        (("layers", None, "heads"), (80, 8, 4096), P(None, None, "tensor")),
        (("layers", "embed"), (4000, 1000), P(None, ("expert", "fsdp"))),
        (("expert", "embed", "mlp"), (6, 64, 96), P("expert", "fsdp", "tensor")),
        (("expert", "embed", "mlp"), (5, 64, 96), P(None, ("expert", "fsdp"), "tensor")),
        # Experts: spare axes lie outside those along which rows are spread.
        (("expert", "embed", "mlp"), (8, 513, 1024), P("expert", None, ("tensor", "fsdp"))),
        (("expert", "embed", "mlp"), (8, 1024, 513), P("expert", ("tensor", "fsdp"), None)),
    ],
)
def test_another_dimension_of_a_large_parameter_takes_what_is_left(axes, shape, expected):
    mesh = make_mesh(ROUTED)
    assert stored_spec(axes, shape, mesh) == expected
    place = jax.NamedSharding(mesh, expected)
    assert place.shard_shape(shape)  # divides


def test_an_unknown_axis_is_an_error():
    with pytest.raises(KeyError, match="hidden"):
        spec(("hidden",), (4,), make_mesh(CUBE))


def test_rules_name_mesh_axes():
    for target in (*RULES.values(), *SPARE.values()):
        assert set((target,) if isinstance(target, str) else target or ()) <= set(AXES)


@pytest.mark.parametrize("name", METHODS)
def test_every_parameter_of_every_method_has_a_layout_that_uses_no_axis_twice(name):
    method = METHODS[name]()
    mesh = make_mesh(CUBE)
    places = flatten(shardings(param_axes(CONFIG, method), abstract_params(CONFIG, method), mesh))
    assert places.keys() == flatten(abstract_params(CONFIG, method)).keys()
    for path, place in places.items():
        entries = [(e,) if isinstance(e, str) else e for e in place.spec if e is not None]
        used = [axis for entry in entries for axis in entry]
        assert len(used) == len(set(used)), path


def test_moments_lie_as_their_parameters_and_the_rest_is_whole():
    import optax

    mesh = make_mesh(CUBE)
    method = Lora(rank=2)
    shapes = abstract_params(CONFIG, method)
    places = flatten(shardings(param_axes(CONFIG, method), shapes, mesh))
    known = {path: (leaf.shape, places[path]) for path, leaf in flatten(shapes).items()}
    state = jax.eval_shape(optax.scale_by_adam().init, shapes)
    found = state_shardings(state, known, mesh)
    assert flatten(found.mu) == flatten(found.nu) == places
    assert found.count.spec == P()
    # Adafactor keeps rows and columns of a matrix: of another shape, so they stay whole.
    factored = jax.eval_shape(optax.scale_by_factored_rms(min_dim_size_to_factor=2).init, shapes)
    rows = state_shardings(factored, known, mesh)
    assert flatten(rows.v_row)["lm_head/kernel"].spec == P()


def test_constrain_needs_a_mesh_to_do_anything():
    x = jnp.zeros((8, 4))
    assert constrain(x, "batch", None) is x
    with jax.set_mesh(make_mesh({"fsdp": 4})):
        placed = jax.jit(lambda x: constrain(x, "batch", None))(x)
    assert placed.sharding.shard_shape(x.shape) == (2, 4)
