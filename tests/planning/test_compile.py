"""What the compiler's figures become, on a small program for the devices that are here."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxtune.planning import compile


def test_a_step_is_compiled_and_measured():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    spread = NamedSharding(mesh, P("x", None))
    state = jax.ShapeDtypeStruct((64, 32), jnp.float32, sharding=spread)
    weight = jax.ShapeDtypeStruct((32, 32), jnp.float32, sharding=NamedSharding(mesh, P()))

    def step(state, weight):
        return state + jnp.sum(state @ weight), jnp.mean(state)

    jitted = jax.jit(step, donate_argnums=0, out_shardings=(spread, NamedSharding(mesh, P())))
    found = compile.compile_step(jitted, (state, weight), mesh)
    assert found.fits and found.compile_seconds > 0
    assert found.argument_bytes == 8 * 32 * 4 + 32 * 32 * 4
    parts = (found.argument_bytes, found.temp_bytes, found.output_bytes, found.code_bytes)
    assert found.total_bytes == sum(parts) and found.output_bytes < 8 * 32 * 4  # it is donated
    assert found.flops == 2 * 8 * 32 * 32
    assert {c.kind for c in found.collectives} == {"all-reduce"}


@pytest.mark.parametrize(
    "message",
    [
        "XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 20.5G of "
        "15.75G hbm. Exceeded hbm capacity by 4.75G.",
        "Ran out of memory on HBM, the total memory required for HLO temporaries (20.5G) exceeds "
        "available HBM (15.75G).",
    ],
)
def test_a_program_that_the_compiler_refuses_does_not_fit(message):
    class Refused:
        def lower(self, *_):
            raise jax.errors.JaxRuntimeError(f"RESOURCE_EXHAUSTED: {message}")

    mesh = jax.make_mesh((1,), ("x",), axis_types=(AxisType.Auto,), devices=jax.devices()[:1])
    found = compile.compile_step(Refused(), (), mesh)
    assert not found.fits and found.total_bytes == int(20.5 * 2**30)
    assert found.collectives is None


def test_other_failures_are_not_hidden():
    class Broken:
        def lower(self, *_):
            raise jax.errors.JaxRuntimeError("INTERNAL: a bug")

    mesh = jax.make_mesh((1,), ("x",), axis_types=(AxisType.Auto,), devices=jax.devices()[:1])
    with pytest.raises(jax.errors.JaxRuntimeError, match="a bug"):
        compile.compile_step(Broken(), (), mesh)


def test_the_effort_is_put_back():
    before = jax.config.jax_exec_time_optimization_effort
    with compile.effort(compile.LEAST):
        assert jax.config.jax_exec_time_optimization_effort == -1.0
    assert jax.config.jax_exec_time_optimization_effort == before
