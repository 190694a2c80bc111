"""Attention in a loop over heads against attention at once."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune.models.attention import Where, attend
from jaxtune.models.attention_heads import attend_heads


@pytest.mark.parametrize("tokens", [3, 24])
@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize(
    "extras", [(), ("prefix",), ("scale", "softcap"), ("sinks",), ("prefix", "softcap", "sinks")]
)
def test_the_loop_gives_what_the_batched_products_give(tokens, groups, extras):
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape, np.float32))

    query, key, value = normal(2, tokens, 6, 8), normal(2, 31, groups, 8), normal(2, 31, groups, 8)
    mask = jnp.asarray(rng.random((2, tokens, 31)) < 0.5).at[:, :, 0].set(True)
    where = Where(None, None, None, mask)
    known = {"scale": 0.7, "softcap": 2.0, "sinks": normal(6)}
    known["prefix"] = (normal(4, groups, 8), normal(4, groups, 8))
    settings = {name: known[name] for name in extras}
    expected = attend(query, key, value, where, **settings)
    np.testing.assert_allclose(
        attend_heads(query, key, value, where, **settings), expected, atol=2e-6
    )


def test_a_row_without_a_visible_key_gives_finite_numbers():
    query, key = jnp.ones((1, 16, 2, 4)), jnp.ones((1, 16, 2, 4))
    where = Where(None, None, None, jnp.zeros((1, 16, 16), bool))
    assert bool(jnp.all(jnp.isfinite(attend_heads(query, key, key, where))))
