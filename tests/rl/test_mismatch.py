import numpy as np
import pytest

from jaxtune.rl.mismatch import mismatch

RNG = np.random.default_rng(0)


def test_by_hand():
    sampled, trained = [[-1.0, -2.0, -9.0]], [[-1.5, -1.0, 0.0]]
    found = mismatch(sampled, trained, [[1, 1, 0]])
    assert found["max"] == 1.0 and found["mean"] == 0.75
    assert found["k1"] == pytest.approx((0.5 - 1.0) / 2)
    k3 = (np.exp(-0.5) - 1 + 0.5 + np.exp(1.0) - 1 - 1.0) / 2
    assert found["k3"] == pytest.approx(k3)


def test_both_estimate_the_divergence_of_the_sampler_from_the_trainer():
    """C23: an enumerated vocabulary; tokens drawn in proportion to the sampler's probabilities."""
    q, p = (np.random.default_rng(n).dirichlet(np.ones(7)) for n in (1, 2))
    ids = RNG.choice(7, 200_000, p=q)
    exact = np.sum(q * np.log(q / p))
    found = mismatch(np.log(q)[ids], np.log(p)[ids], np.ones(ids.size))
    for name, values in (("k1", np.log(q / p)), ("k3", p / q - 1 - np.log(p / q))):
        spread = np.sqrt(np.sum(q * (values - exact) ** 2) / ids.size)
        assert abs(found[name] - exact) < 5 * spread


def test_equal_is_zero_and_what_is_no_number_stays_none():
    same = RNG.normal(size=(2, 3))
    assert set(mismatch(same, same, np.ones((2, 3))).values()) == {0.0}
    broken = same.copy()
    broken[0, 0] = np.nan
    assert all(np.isnan(v) for v in mismatch(broken, same, np.ones((2, 3))).values())
    assert np.isfinite(mismatch([[-900.0]], [[0.0]], [[1]])["k3"])


def test_what_is_refused():
    with pytest.raises(ValueError, match="differ"):
        mismatch(np.zeros((1, 2)), np.zeros((1, 3)), np.ones((1, 2)))
    with pytest.raises(ValueError, match="no token was drawn"):
        mismatch(np.zeros((1, 2)), np.zeros((1, 2)), np.zeros((1, 2)))
