"""What a mesh cannot do for a model is said by name."""

import jax
import jax.numpy as jnp

from jaxtune.models.decoder import abstract_params, param_axes
from jaxtune.models.presets import preset
from jaxtune.parallel.findings import findings
from jaxtune.parallel.mesh import make_mesh
from jaxtune.peft.full import Full
from jaxtune.peft.lora import Lora


def found(name, sizes, method=None):
    """{(parameter, logical axis, mesh axis): Finding} of a preset."""
    config, method = preset(name), Full() if method is None else method
    axes, shapes = param_axes(config, method), abstract_params(config, method)
    every = findings(axes, shapes, make_mesh(sizes))
    return {(f.parameter, f.logical_axis, f.mesh_axis): f for f in every}


def test_a_model_that_the_mesh_splits_as_the_rules_say_has_none():
    assert found("llama3.1-8b", {"data": 2, "fsdp": 2, "tensor": 2}) == {}
    assert found("qwen3-30b-a3b", {"fsdp": 2, "tensor": 2, "expert": 2}) == {}
    assert found("llama3.1-8b", {"data": 8}) == {}
    assert found("llama3.1-8b", {}) == {}


def test_an_odd_vocabulary_is_split_along_another_dimension():
    every = found("gpt2-124m", {"fsdp": 2, "tensor": 4})
    [(key, finding)] = every.items()
    assert key == ("embed/embedding", "vocab", "tensor")
    assert finding.why == "vocab of 50,257 is no multiple of 4; embed is split instead"
    assert finding.bytes_per_device == 50257 * 768 * 4 // 8
    assert finding.line().startswith("mesh.tensor: embed/embedding: vocab of 50,257")
    assert "(18.4 MiB a device)" in finding.line()


def test_a_large_parameter_that_stays_whole_is_named_with_its_bytes():
    """Of three tensor shards, neither heads nor embedding of an 8B model are a multiple."""
    every = found("llama3.1-8b", {"tensor": 3})
    finding = every["blocks/mlp/up_proj/kernel", "mlp", "tensor"]
    assert finding.why == "mlp of 14,336 is no multiple of 3; it is whole there"
    assert finding.bytes_per_device == 32 * 4096 * 14336 * 4
    assert ("embed/embedding", "vocab", "tensor") not in every  # 128,256 is a multiple
    assert not any("norm" in path for path, *_ in every)  # small


def test_adapters_have_findings_of_their_own():
    method = Lora(rank=64, targets=("q_proj",))
    every = found("llama3.1-8b", {"tensor": 3}, method)
    assert (
        every["blocks/attn/q_proj/lora/b", "heads", "tensor"].bytes_per_device == 32 * 64 * 4096 * 4
    )
    every = found("llama3.1-8b", {"tensor": 3}, Lora(rank=4, targets=("q_proj",)))
    assert ("blocks/attn/q_proj/lora/b", "heads", "tensor") not in every


def test_a_mesh_axis_that_splits_nothing_is_named():
    finding = found("llama3.1-8b", {"expert": 2})["", "expert", "expert"]
    assert finding.line() == "mesh.expert: " + finding.why and "as `fsdp`" in finding.why
    axes, shapes = {"scale": ("embed",)}, {"scale": jax.ShapeDtypeStruct((7,), jnp.float32)}
    names = [(f.parameter, f.mesh_axis) for f in findings(axes, shapes, make_mesh({"tensor": 2}))]
    assert names == [("", "tensor")]


def test_experts_that_their_axis_does_not_divide_are_named():
    axes = {"up": ("layers", "expert", "embed", "mlp")}
    shapes = {"up": jax.ShapeDtypeStruct((2, 6, 512, 1024), jnp.bfloat16)}
    every = findings(axes, shapes, make_mesh({"expert": 4}))
    assert [(f.parameter, f.logical_axis) for f in every] == [("", "expert"), ("up", "expert")]
    assert every[1].why == "expert of 6 is no multiple of 4; embed is split instead"
    assert every[1].bytes_per_device == 2 * 6 * 512 * 1024 * 2 // 4
