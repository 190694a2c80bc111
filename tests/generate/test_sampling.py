import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune.generate import sampling
from jaxtune.generate.sampling import nucleus, row_keys, step_keys

RNG = np.random.default_rng(0)
sample = jax.jit(lambda *args: sampling.sample(*args).ids)


def kept_oracle(scores: np.ndarray, top_k: int, top_p: float) -> np.ndarray:
    """bool [V]: transformers' top-k, then top-p, with sets and loops."""
    kept = set(range(len(scores)))
    if top_k > 0:
        kth = sorted(scores, reverse=True)[min(top_k, len(scores)) - 1]
        kept = {i for i in kept if scores[i] >= kth}
    if top_p < 1:
        weights = {i: np.exp(np.float64(scores[i])) for i in kept}
        total, reached, nucleus_set = sum(weights.values()), 0.0, set()
        for i in sorted(kept, key=lambda i: (-scores[i], i)):
            if nucleus_set and reached >= top_p * total:
                break
            nucleus_set.add(i)
            reached += weights[i]
        kept = nucleus_set
    return np.array([i in kept for i in range(len(scores))])


@pytest.mark.parametrize("top_k", [0, 1, 4, 17, 400])
@pytest.mark.parametrize("top_p", [0.01, 0.3, 0.8, 0.999, 1.0])
def test_top_k_then_top_p_keep_what_a_loop_keeps(top_k, top_p):
    scores = np.sort(RNG.normal(0, 2, (5, 17)).astype(np.float32))[:, ::-1].copy()
    found = np.isfinite(np.asarray(nucleus(jnp.asarray(scores), top_k, top_p)))
    wanted = np.stack([kept_oracle(row, top_k, top_p) for row in scores])
    np.testing.assert_array_equal(found, wanted)


def test_top_k_keeps_what_ties_with_the_kth():
    ranked = jnp.asarray([[3.0, 2.0, 2.0, 2.0, 1.0]])
    assert np.isfinite(np.asarray(nucleus(ranked, 2, 1.0)))[0].tolist() == [True] * 4 + [False]


def test_the_token_that_crosses_p_is_kept():
    ranked = jnp.log(jnp.asarray([[0.5, 0.3, 0.2]]))
    for top_p, count in ((0.4, 1), (0.6, 2), (0.79, 2), (0.9, 3)):
        assert np.isfinite(np.asarray(nucleus(ranked, 0, top_p))).sum() == count


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (0.6, 0, 0.9), (1.7, 4, 1.0), (1.3, 5, 0.7)]
)
def test_frequencies_are_the_filtered_probabilities(temperature, top_k, top_p):
    draws, scores = 40_000, RNG.normal(0, 1.5, 9).astype(np.float32)
    keys = jax.random.split(jax.random.key(5), draws)
    logits = jnp.broadcast_to(jnp.asarray(scores), (draws, 9))
    ids = np.asarray(sample(logits, keys, temperature, top_k, top_p))
    heat = scores / temperature
    wanted = np.where(kept_oracle(heat, top_k, top_p), np.exp(np.float64(heat)), 0.0)
    wanted /= wanted.sum()
    found = np.bincount(ids, minlength=9) / draws
    assert np.all(found[wanted == 0] == 0)
    # five standard deviations of a binomial share
    assert np.all(np.abs(found - wanted) <= 5 * np.sqrt(wanted * (1 - wanted) / draws) + 1e-9)


def test_temperature_zero_is_argmax_and_tiny_temperatures_stay_finite():
    logits = jnp.asarray(RNG.normal(0, 30, (64, 21)), jnp.float32)
    keys = jax.random.split(jax.random.key(0), 64)
    best = np.argmax(np.asarray(logits), axis=-1)
    for temperature in (0.0, 1e-30, 1e-6):
        for top_k, top_p in ((0, 1.0), (3, 0.5)):
            ids = sample(logits, keys, temperature, top_k, top_p)
            assert ids.dtype == jnp.int32
            np.testing.assert_array_equal(np.asarray(ids), best)


def test_a_filter_that_removes_nothing_changes_no_draw():
    logits = jnp.asarray(RNG.normal(0, 1, (64, 21)), jnp.float32)
    keys = jax.random.split(jax.random.key(3), 64)
    plain = np.asarray(sample(logits, keys, 1.0, 0, 1.0))
    np.testing.assert_array_equal(np.asarray(sample(logits, keys, 1.0, 21, 1.0)), plain)
    assert len(set(plain.tolist())) > 5


def test_settings_are_runtime_values():
    traces = []

    @jax.jit
    def counted(*args):
        traces.append(1)
        return sampling.sample(*args)

    logits, keys = jnp.zeros((2, 7)), jax.random.split(jax.random.key(0), 2)
    for settings in ((0.0, 0, 1.0), (1.0, 3, 0.5), (0.7, 0, 0.9)):
        counted(logits, keys, *settings)
    assert len(traces) == 1


@pytest.mark.parametrize("count", [1, 2, 17, 300])
def test_a_draw_inverts_the_cumulative_distribution(count):
    """Frequencies of many draws, with weights of 0 between and far from each other in size."""
    draws = 20_000
    weights = np.exp(RNG.normal(0, 2, count)) * (np.arange(count) % 3 != 1)
    uniform = jax.random.uniform(jax.random.key(count), (draws, 2))
    rows = jnp.broadcast_to(jnp.asarray(weights, jnp.float32), (draws, count))
    found = np.bincount(np.asarray(sampling.invert(rows, uniform)), minlength=count) / draws
    wanted = weights / weights.sum()
    assert found.shape == wanted.shape and np.all(found[weights == 0] == 0)
    assert np.all(np.abs(found - wanted) <= 5 * np.sqrt(wanted * (1 - wanted) / draws) + 1e-9)
    ends = jnp.asarray([[0.0, 0.0], [1.0, 1.0]]) * (1 - 2.0**-23)
    first, last = np.asarray(sampling.invert(rows[:2], ends))
    assert weights[first] > 0 and weights[last] > 0


def test_keys_belong_to_seed_row_and_step():
    data = jax.random.key_data
    all_rows = data(row_keys(7, 0, 6))
    np.testing.assert_array_equal(data(row_keys(7, 4, 2)), all_rows[4:])
    first, second = data(step_keys(row_keys(7, 0, 6), 0)), data(step_keys(row_keys(7, 0, 6), 1))
    other = data(step_keys(row_keys(8, 0, 6), 0))
    distinct = {tuple(k) for k in np.concatenate([first, second, other]).tolist()}
    assert len(distinct) == 18
