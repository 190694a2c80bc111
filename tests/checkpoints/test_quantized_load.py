"""A checkpoint that is quantised while it is read: the same bits as after, on any mesh."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from jaxtune.checkpoints.hf_export import save_hf
from jaxtune.core.quantize import quantize
from jaxtune.core.tree import flatten
from jaxtune.models.config import Experts
from jaxtune.parallel.mesh import make_mesh
from jaxtune.recipes.base import from_hf, quantized
from tests.checkpoints.world import BASE, CONFIG, random_params

pytestmark = pytest.mark.slow

WIDE = dataclasses.replace(CONFIG, hidden_size=128, intermediate_size=192, head_dim=32)
MODELS = {
    "llama": WIDE,
    "mixtral": dataclasses.replace(WIDE, family="mixtral", experts=Experts(4, 2)),
}
KEPT = ("embed/embedding", "lm_head/kernel", "final_norm/scale", "blocks/mlp_norm/scale")


@pytest.mark.parametrize(("family", "kind"), [("llama", "nf4"), ("mixtral", "int8")])
def test_leaves_are_those_of_the_whole_kernels(family, kind, tmp_path):
    config = MODELS[family]
    save_hf(tmp_path / "model", config, random_params(config, BASE), dtype="float32")
    base = from_hf(tmp_path / "model")
    meshes = [make_mesh({}, jax.devices()[:1]), make_mesh({"fsdp": 2, "tensor": 4})]
    whole = flatten(base.load(lambda _: np.float32, meshes[0]))
    alone, spread = (flatten(base.load(lambda _: np.float32, mesh, kind)) for mesh in meshes)
    config = dataclasses.replace(base.config, quantize=kind)
    after = flatten(quantized(config, base.load(lambda _: np.float32, meshes[0]), meshes[0]))
    assert list(alone) == list(spread) == list(after)
    for path, leaf in alone.items():
        assert leaf.dtype == spread[path].dtype == after[path].dtype
        assert leaf.tobytes() == np.asarray(spread[path]).tobytes() == after[path].tobytes()
    for path in KEPT:
        np.testing.assert_array_equal(alone[path], whole[path])
    quantised = [path for path in whole if path not in alone]
    assert len(quantised) == 7 and all(path.endswith("_proj/kernel") for path in quantised)
    for path in quantised:
        for name, leaf in quantize(whole[path], kind).items():
            np.testing.assert_array_equal(alone[f"{path}/{name}"], leaf)
    codes = spread["blocks/attn/q_proj/kernel/codes"]
    rows = codes.shape[1] // 2
    assert codes.addressable_shards[0].data.shape == (3, rows, 32)
