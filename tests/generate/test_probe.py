import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune.core.errors import RequestError
from jaxtune.models import decoder
from jaxtune.models.cache import empty_cache
from jaxtune.models.config import LayerKind, pattern_of
from jaxtune.models.probe import probe
from jaxtune.peft.prefix import Prefix
from tests.generate.tiny_models import CONFIG, model, row_logits

IDS = [5, 9, 2]


@pytest.mark.parametrize("windows", [(None,), (None, 2, None)])
def test_a_prefix_started_from_ids_acts_as_those_ids_in_front(windows):
    """With full attention, keys and values of real tokens are those tokens."""
    config = dataclasses.replace(CONFIG, **pattern_of([LayerKind(size) for size in windows]))
    _, method, params = model("full", config)
    keys, values = probe(config, params)(jnp.asarray([IDS]))
    width = config.num_kv_heads * config.head_dim
    assert keys.shape == values.shape == (config.num_layers, len(IDS), width)
    batch = {
        "input_ids": np.asarray([IDS]),
        "segment_ids": np.ones((1, 3), np.int32),
        "positions": np.arange(3)[None],
    }
    empty = empty_cache(config, 1, 3)
    cache = decoder.hidden_states(config, method, params, batch, cache=empty).cache
    np.testing.assert_allclose(keys, cache.keys.swapaxes(2, 3).reshape(keys.shape), atol=1e-5)
    np.testing.assert_allclose(values, cache.values.swapaxes(2, 3).reshape(values.shape), atol=1e-5)
    if windows != (None,):
        return
    attn = params["blocks"]["attn"] | {"prefix": {"key": keys, "value": values}}
    tuned = params | {"blocks": params["blocks"] | {"attn": attn}}
    batch = {
        "input_ids": np.asarray([[40, 7]]),
        "segment_ids": np.ones((1, 2), np.int32),
        "positions": np.arange(2)[None],
    }
    method = Prefix(num_tokens=3)
    hidden = decoder.hidden_states(config, method, tuned, batch).states
    found = decoder.logits(config, method, tuned, hidden)[0]
    np.testing.assert_allclose(found, row_logits("full", [*IDS, 40, 7])[3:], atol=1e-4)


def test_a_method_s_own_leaves_are_left_out():
    config, method, params = model("prefix")
    base = model("full")[2]
    stripped = jax.tree.map(lambda leaf: leaf, params)
    del stripped["blocks"]["attn"]["prefix"]
    assert jax.tree.structure(stripped) == jax.tree.structure(base)
    ids = jnp.asarray([IDS])
    for found, wanted in zip(probe(config, params)(ids), probe(config, stripped)(ids), strict=True):
        np.testing.assert_array_equal(found, wanted)
    started = method.start(params, jax.random.key(0), probe(config, params))
    prefix = started["blocks"]["attn"]["prefix"]
    assert jax.tree.map(jnp.shape, prefix) == jax.tree.map(
        jnp.shape, params["blocks"]["attn"]["prefix"]
    )


def test_more_tokens_than_positions_are_refused():
    run = probe(CONFIG, model("full")[2])
    with pytest.raises(RequestError, match=r"peft.num_tokens: 97 tokens exceed the model's 96"):
        run(jnp.zeros((1, 97), jnp.int32))
