"""Routed experts beside loops over experts and tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune.models.config import Experts
from jaxtune.models.experts import AXES, mixture
from jaxtune.models.layers import gated_activation
from jaxtune.models.routing import Routing, balance
from jaxtune.models.sorted_rows import sorted_rows, unsorted_rows

B, T, D, F = 2, 5, 8, 12
CASES = {
    "mixtral": (Experts(4, 2), "silu"),
    "qwen3_moe": (Experts(5, 3, normalise=False), "silu"),
    "gpt_oss": (Experts(4, 2, router_bias=True, bias=True), "swiglu_clipped"),
    "one": (Experts(3, 1), "gelu"),
    "adapted": (Experts(4, 2, bias=True), "silu"),
}


def leaves_of(experts: Experts, adapted: bool = False, seed: int = 0) -> dict:
    rng = np.random.default_rng(seed)
    sizes = {"embed": D, "mlp": F, "expert": experts.count, None: experts.count}

    def leaf(name, key, axes):
        shape = [sizes[axis] for axis in axes]
        if key in ("a", "b"):  # of rank 3
            shape[-1 if key == "a" else -2] = 3
        return jnp.asarray(rng.standard_normal(shape) * 0.7, jnp.float32)

    def has(name, key):
        if key in ("a", "b"):
            return adapted
        return key == "kernel" or (experts.router_bias if name == "router" else experts.bias)

    return {n: {k: leaf(n, k, a) for k, a in axes.items() if has(n, k)} for n, axes in AXES.items()}


def inputs(seed: int = 1) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal((B, T, D)), jnp.float32)


def slow(experts: Experts, activation: str, x, leaves):
    """Every expert computes every token; the weights of those not chosen are 0.

    What is added to a kernel is in it: kernel + a b.
    """
    leaves = {
        name: node | {"kernel": node["kernel"] + (node["a"] @ node["b"] if "a" in node else 0.0)}
        for name, node in leaves.items()
    }
    router = leaves["router"]
    scores = x @ router["kernel"] + router.get("bias", 0.0)
    p = jnp.exp(scores) / jnp.sum(jnp.exp(scores), axis=-1, keepdims=True)
    least = jnp.sort(p, axis=-1)[..., -experts.per_token, None]
    weights = jnp.where(p >= least, p, 0.0)
    if experts.normalise:
        weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    total = 0.0
    for e in range(experts.count):

        def project(name, h, e=e):
            node = leaves[name]
            return h @ node["kernel"][e] + (node["bias"][e] if "bias" in node else 0.0)

        inner = gated_activation(activation, project("gate_proj", x), project("up_proj", x))
        total = total + weights[..., e, None] * project("down_proj", inner)
    return total


@pytest.mark.parametrize("name", CASES)
def test_value_and_gradient_equal_a_loop_over_experts(name):
    experts, activation = CASES[name]
    x, leaves = inputs(), leaves_of(experts, name == "adapted")
    target = inputs(2)

    def run(function):
        def scalar(x, leaves):
            return jnp.sum(function(x, leaves) * target)

        value, grads = jax.jit(jax.value_and_grad(scalar, (0, 1)))(x, leaves)
        return jax.jit(function)(x, leaves), value, grads

    ours = run(lambda x, leaves: mixture(experts, activation, x, leaves)[0])
    theirs = run(lambda x, leaves: slow(experts, activation, x, leaves))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), ours, theirs)


def test_no_token_is_dropped_when_all_choose_the_same_expert():
    experts = Experts(4, 2, router_bias=True)
    leaves = leaves_of(experts)
    leaves["router"]["bias"] = jnp.asarray([50.0, -50.0, 60.0, -50.0])
    y, routing = jax.jit(lambda x, w: mixture(experts, "silu", x, w))(inputs(), leaves)
    assert set(np.unique(routing.chosen)) == {0, 2}
    np.testing.assert_allclose(y, slow(experts, "silu", inputs(), leaves), rtol=2e-5, atol=2e-5)


def test_balance_equals_loops_and_leaves_padding_out():
    rng = np.random.default_rng(0)
    experts = Experts(4, 2)
    run = jax.jit(lambda x, w: mixture(experts, "silu", x, w)[1])
    routing = run(inputs(), leaves_of(experts))
    real = rng.random((B, T)) < 0.6
    real[:, 0] = True
    expected = []
    for row in range(B):
        tokens = [t for t in range(T) if real[row, t]]
        total = 0.0
        for e in range(experts.count):
            sent = sum(list(routing.chosen[row, t]).count(e) for t in tokens) / len(tokens)
            mean = sum(float(routing.probabilities[row, t, e]) for t in tokens) / len(tokens)
            total += sent * mean
        expected.append(experts.count * total)
    np.testing.assert_allclose(balance(routing, jnp.asarray(real)), expected, rtol=1e-5)
    assert balance(routing, jnp.zeros((B, T), bool)).tolist() == [0.0, 0.0]


def test_balance_is_k_where_experts_share_alike_and_more_elsewhere():
    even = Routing(
        jnp.full((1, 4, 2), 0.5),
        jnp.asarray([[[0, 1], [2, 3], [0, 1], [2, 3]]]),
        jnp.full((1, 4, 4), 0.25),
    )
    assert balance(even, jnp.ones((1, 4), bool)).tolist() == [2.0]
    probabilities = jnp.asarray([[[0.5, 0.5, 0.0, 0.0]] * 4])
    uneven = Routing(even.weights, jnp.zeros((1, 4, 2), int).at[..., 1].set(1), probabilities)
    assert balance(uneven, jnp.ones((1, 4), bool)).tolist() == [4.0]


def test_sorting_rows_and_back_has_the_derivative_of_plain_gathers():
    n, k, width = 6, 3, 4
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (n, width))
    factor = jax.random.normal(keys[1], (n * k, width))
    order = jnp.argsort(jax.random.randint(keys[2], (n * k,), 0, 5))
    place = jnp.argsort(order)

    def ours(x):
        rows = jnp.cos(sorted_rows(x, order, place)) * factor
        return jnp.sin(unsorted_rows(rows, order, place)).sum()

    def plain(x):
        return jnp.sin((jnp.cos(x[order // k]) * factor)[place]).sum()

    np.testing.assert_array_equal(ours(x), plain(x))
    np.testing.assert_allclose(jax.grad(ours)(x), jax.grad(plain)(x), rtol=1e-5)
