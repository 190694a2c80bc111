"""Task vectors: against NumPy, written out."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune.core.merging import COMBINE, combined, dare, soup, ties

KEY = jax.random.key(0)


def ties_by_hand(vectors, density):
    """One element after the other."""
    models, size = len(vectors), vectors[0].size
    kept = round(density * size)
    trimmed = np.zeros((models, size))
    for m, vector in enumerate(vectors):
        for place in np.argsort(-np.abs(vector.ravel()))[:kept]:
            trimmed[m, place] = vector.ravel()[place]
    out = np.zeros(size)
    for place in range(size):
        sign = np.sign(trimmed[:, place].sum())
        same = [v for v in trimmed[:, place] if v != 0 and np.sign(v) == sign]
        out[place] = np.mean(same) if same else 0.0
    return out.reshape(vectors[0].shape)


def test_ties_trims_elects_and_averages():
    vectors = np.random.default_rng(0).standard_normal((3, 6, 5)).astype(np.float32)
    for density in (0.2, 0.5, 1.0):
        found = ties(jnp.asarray(vectors), density, KEY)
        np.testing.assert_allclose(found, ties_by_hand(list(vectors), density), atol=1e-6)


def test_dare_keeps_the_expected_vector():
    vector = jnp.full((1, 400, 100), 2.0)
    found = np.asarray(dare(vector, 0.25, KEY))
    assert set(np.unique(found)) == {0.0, 8.0}
    assert abs(found.mean() - 2.0) < 5 * 8 * np.sqrt(0.25 * 0.75 / found.size)


def test_interpolation_is_linear_between_base_and_tuned():
    base, tuned = jnp.array([1.0, -2.0], jnp.bfloat16), jnp.array([3.0, 2.0])
    for share, wanted in ((0.0, [1, -2]), (1.0, [3, 2]), (0.25, [1.5, -1]), (1.5, [4, 4])):
        found = combined(base, [tuned], soup, share=share, density=1.0, key=KEY)
        np.testing.assert_allclose(found, wanted)


@pytest.mark.parametrize("name", COMBINE)
def test_equal_models_merge_to_themselves(name):
    base, tuned = jnp.zeros((4, 4)), jnp.arange(16.0).reshape(4, 4) - 7.5
    found = combined(base, [tuned, tuned], COMBINE[name], share=0.5, density=1.0, key=KEY)
    np.testing.assert_allclose(found, tuned / 2)
