"""The score head: where it is, that every method trains it, and what it computes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune.core.tree import flatten
from jaxtune.models import decoder
from jaxtune.models.presets import preset
from jaxtune.parallel.mesh import make_mesh
from jaxtune.peft.lora import Lora
from jaxtune.peft.method import FROZEN, SCORE, TRAINED, Method, labels
from jaxtune.peft.registry import METHODS
from jaxtune.recipes.assemble import plan_parts
from jaxtune.recipes.base import BASE, Base
from jaxtune.recipes.heads import Heads, headed, with_heads

TINY = dataclasses.replace(preset("tiny-1m"), dtype="float32")
REWARD = headed(TINY, Heads(lm=False, score=True))


def test_a_reward_model_has_the_score_head_alone():
    paths = flatten(decoder.abstract_params(REWARD, BASE))
    assert paths[SCORE].shape == (TINY.hidden_size, 1)
    assert paths[SCORE].dtype == jnp.float32
    assert not any(path.startswith("lm_head") for path in paths)
    assert decoder.param_axes(REWARD, BASE)["score"]["kernel"] == ("embed", None)
    both = flatten(decoder.abstract_params(headed(TINY, Heads(score=True)), BASE))
    assert both.keys() == {*flatten(decoder.abstract_params(TINY, BASE)), SCORE}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains_it(name):
    method = METHODS[name]()
    kinds = flatten(labels(method, decoder.abstract_params(REWARD, method)))
    assert kinds[SCORE] == TRAINED
    assert name == "full" or kinds["embed/embedding"] == FROZEN


def test_it_is_saved_in_float32_counted_and_spread():
    config = dataclasses.replace(REWARD, dtype="bfloat16")
    parts = plan_parts(config, Lora(rank=2), make_mesh({"fsdp": 4}, jax.devices()[:4]))
    saved = flatten(parts.saved_shapes()["trainable"])
    assert saved[SCORE].dtype == jnp.float32
    assert saved[SCORE].sharding.spec[0] == "fsdp"
    without = plan_parts(TINY, Lora(rank=2), make_mesh({}, jax.devices()[:1])).counts()
    assert parts.counts()["trainable"] == without["trainable"] + TINY.hidden_size


def test_scores_are_the_product_with_its_kernel():
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(2, 3, TINY.hidden_size)).astype(np.float32)
    params = decoder.init_params(REWARD, BASE, jax.random.key(0))
    assert not np.asarray(params["score"]["kernel"]).any()
    kernel = rng.normal(size=(TINY.hidden_size, 1)).astype(np.float32)
    params["score"]["kernel"] = jnp.asarray(kernel)
    scores = decoder.scores(REWARD, BASE, params, jnp.asarray(hidden))
    assert scores.shape == (2, 3)
    assert scores.dtype == jnp.float32
    np.testing.assert_allclose(scores, hidden @ kernel[:, 0], rtol=1e-5, atol=1e-5)


def test_heads_of_a_base_are_added_and_let_go():
    mesh = make_mesh({}, jax.devices()[:1])

    def load(dtype_of, mesh, quantize="none"):
        params = decoder.init_params(TINY, BASE, jax.random.key(0))
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: leaf.astype(dtype_of("/".join(k.key for k in path))), params
        )

    base = Base(TINY, load, None, lambda: "")
    reward = with_heads(base, Heads(lm=False, score=True))
    shapes = flatten(decoder.abstract_params(reward.config, Method()))
    params = flatten(reward.load({path: jnp.float32 for path in shapes}.__getitem__, mesh))
    assert list(params) == list(shapes)
    assert not np.asarray(params[SCORE]).any()
    back = with_heads(with_heads(base, Heads(score=True)), Heads())
    assert (
        flatten(back.load(lambda _: jnp.float32, mesh)).keys()
        == flatten(decoder.abstract_params(TINY, BASE)).keys()
    )
