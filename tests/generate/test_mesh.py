import dataclasses

import jax
import numpy as np
import pytest

from jaxtune.generate import scoring
from jaxtune.generate.engine import generate
from jaxtune.generate.placement import mesh_of
from jaxtune.generate.slots import left_padded, programs
from jaxtune.models.decoder import init_params, param_axes
from jaxtune.parallel.mesh import make_mesh
from jaxtune.parallel.rules import shardings
from tests.generate.tiny_models import model

pytestmark = pytest.mark.slow

PROMPTS = [[5, 9, 2, 40, 7], [3], [60, 1, 1, 17, 8, 30, 22, 4, 11, 50, 31], [12, 13]]


@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")
@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 8, 1)])
def test_sharded_parameters_give_the_tokens_and_scores_of_one_device(sizes):
    config, method, params = model("prompt")
    mesh = make_mesh(dict(zip(("data", "fsdp", "tensor"), sizes, strict=True)))
    spread = jax.device_put(params, shardings(param_axes(config, method), params, mesh))
    assert not spread["blocks"]["mlp"]["up_proj"]["kernel"].is_fully_replicated
    options = {"max_new_tokens": 9, "temperature": 0.8, "top_k": 7, "seed": 2}
    found = generate(config, method, spread, PROMPTS, stop_check=lambda ids: None, **options)
    assert found == generate(config, method, params, PROMPTS, **options)
    ids = np.asarray([PROMPTS[0], PROMPTS[2][:5]])
    np.testing.assert_allclose(
        scoring.logprobs(config, method, spread, ids),
        scoring.logprobs(config, method, params, ids),
        atol=1e-4,
    )


@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")
@pytest.mark.parametrize(
    ("sizes", "kv_heads"), [({"fsdp": 2, "tensor": 4}, 1), ({"fsdp": 2, "expert": 2}, 2)]
)
def test_a_device_holds_its_share_of_the_cache(sizes, kv_heads):
    """Four rows; of one head, its width is spread."""
    config, method, _ = model("lora")
    config = dataclasses.replace(config, num_kv_heads=kv_heads, num_heads=4)
    mesh = make_mesh(sizes)
    params = init_params(config, method, jax.random.key(0))
    params = jax.device_put(params, shardings(param_axes(config, method), params, mesh))
    run = programs(config, method)
    with mesh_of(params):
        read = run.read(params, left_padded(method, PROMPTS, 4))
        begun = run.start(4, 16, 16).cache
    for cache in (read, begun):
        for leaf in (cache.keys, cache.values):
            assert len(leaf.addressable_shards) == mesh.size
            assert leaf.addressable_shards[0].data.nbytes == leaf.nbytes // mesh.size
        assert cache.positions.addressable_shards[0].data.shape[0] < 4
