"""Kernels compiled for devices that are not here: TPU from its description; cuDNN lowered only."""

from __future__ import annotations

import os
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxtune.models.attention import Span, Where, attend
from jaxtune.models.attention_cudnn import attend_cudnn
from jaxtune.models.attention_ring import attend_ring
from jaxtune.models.attention_splash import attend_splash
from jaxtune.parallel.mesh import make_mesh
from tests.models.attention_cases import RIGHT, WHOLE, assert_equal, case, value_and_gradients

pytestmark = pytest.mark.slow
ON_GPU = any(d.platform == "gpu" for d in jax.devices())


@pytest.fixture(scope="module")
def topology():
    """name → four described devices of a TPU."""
    pytest.importorskip("libtpu", reason="compiling for TPU needs the libtpu of jax[tpu]")
    from jax.experimental import topologies

    known = {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no chip is touched, so nobody is in the way
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in known.items():
            if name not in os.environ:
                patch.setenv(name, value)
        yield lambda name: topologies.get_topology_desc(name, "tpu").devices[:4]


def gradient(attend, heads: int, groups: int, size: int, tokens: int, **settings):
    """(function, arguments): gradients by everything, of bfloat16 rows on the mesh that is set."""
    window = settings.pop("window", None)
    sinks = settings.pop("sinks", False)

    def loss(q, k, v, s, segments, positions):
        span = Span(segments, positions)
        extra = {"sinks": s} if sinks else {}
        y = attend(q, k, v, Where(span, span, window), **settings, **extra)
        return jnp.sum(y.astype(jnp.float32))

    def like(*shape, dtype=jnp.bfloat16):
        place = jax.sharding.get_mesh()
        whole = NamedSharding(place, PartitionSpec()) if not place.empty else None
        return jax.ShapeDtypeStruct(shape, dtype, sharding=whole)

    states = [like(2, tokens, n, size) for n in (heads, groups, groups)]
    ids = like(2, tokens, dtype=jnp.int32)
    return jax.grad(loss, (0, 1, 2, 3)), (*states, like(heads, dtype=jnp.float32), ids, ids)


@pytest.mark.parametrize(
    ("name", "shape", "settings"),
    [
        ("v5e:2x2", (8, 2, 128), {}),
        ("v5e:2x2", (8, 2, 64), {"softcap": 50.0, "window": 200, "sinks": True}),
        ("v5p:2x2x1", (8, 2, 256), {"softcap": 50.0, "window": 200}),
    ],
)
def test_splash_compiles_for_tpu_on_a_mesh(topology, name, shape, settings):
    tokens = 512
    with jax.set_mesh(make_mesh({"fsdp": 2, "tensor": 2}, topology(name))):
        function, arguments = gradient(attend_splash, *shape, tokens, **settings)
        compiled = jax.jit(function).lower(*arguments).compile()
    text = compiled.as_text()
    for part in ("fwd", "dq", "dkv"):
        assert f"splash_mha_{part}_segmented" in text
    assert f"{tokens},{tokens}]" not in text  # neither scores nor masks


def test_ring_compiles_for_tpu(topology):
    tokens = 2048
    with jax.set_mesh(make_mesh({"sequence": 4}, topology("v5e:2x2"))):
        function, arguments = gradient(attend_ring, 8, 2, 128, tokens, window=300, softcap=50.0)
        text = jax.jit(function).lower(*arguments).compile().as_text()
    assert "collective-permute" in text
    for size in (tokens, tokens // 4):
        assert f"{size},{size}]" not in text


@pytest.mark.parametrize("window", [None, 100])
def test_cudnn_is_lowered_to_its_flash_attention(monkeypatch, window):
    if not ON_GPU:  # where there is a GPU its own version is asked for
        kernels = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
        monkeypatch.setattr(kernels, "check_cudnn_version", lambda: 91000)
    function, arguments = gradient(attend_cudnn, 8, 2, 64, 256, window=window)
    text = jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    assert "__cudnn$fmhaSoftmax(" in text
    assert "__cudnn$fmhaSoftmaxBackward(" in text
    assert text.count("CAUSAL") == 2
    windows = re.findall(r"sliding_window_length\W+22: (\d+)", text)
    assert windows == ["0" if window is None else "100"] * 2
    assert "256x256" not in text


@pytest.mark.skipif(not ON_GPU, reason="cuDNN runs on a GPU, and there is none")
@pytest.mark.parametrize("window", [None, 40])
def test_cudnn_equals_the_dense_form(window):
    made = case((RIGHT, WHOLE), 256, size=64, window=window, dtype=jnp.bfloat16)
    found, expected = value_and_gradients(attend_cudnn, made), value_and_gradients(attend, made)
    assert_equal(found, expected, tolerance=2e-2)  # a bfloat16 has 8 bits
