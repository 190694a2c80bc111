"""The push away from earlier adapters: its gradient against the penalty, differentiated whole."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxtune.core.tree import flatten, unflatten
from jaxtune.optim.anchor import Pull
from jaxtune.optim.orthogonal import Push, overlap
from jaxtune.optim.transform import OptimSpec, make_transform

A, B, OTHER = "blocks/q/lora/a", "blocks/q/lora/b", "blocks/up/lora/a"


def drawn(seed, **shapes):
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    return {n: jax.random.normal(k, s) for k, (n, s) in zip(keys, shapes.items(), strict=True)}


SHAPES = {A: (2, 6, 3), B: (2, 3, 5), OTHER: (2, 6, 3)}
PARAMS, GRADS = unflatten(drawn(0, **SHAPES)), unflatten(drawn(1, **SHAPES))
FIRST, SECOND = drawn(2, **{A: (2, 6, 3)})[A], drawn(3, **{A: (2, 6, 4)})[A]  # ranks may differ


def transform(push, pull=None):
    spec = OptimSpec(name="sgd", momentum=0.0, clip_norm=None)
    labels = jax.tree.map(lambda _: "trained", PARAMS)
    return make_transform(spec, labels, PARAMS, lambda step: 1.0, pull=pull, push=push)


def stepped(tx):
    updates, _ = tx.update(GRADS, tx.init(PARAMS), PARAMS)
    return optax.apply_updates(PARAMS, updates)


def test_the_overlap_is_the_sum_of_squared_products_of_columns():
    now = flatten(PARAMS)[A]
    by_hand = 0.0
    for layer in range(2):
        for old in FIRST[layer].T:
            by_hand += sum(float(old @ new) ** 2 for new in now[layer].T)
    np.testing.assert_allclose(overlap(FIRST, now), by_hand, rtol=1e-5)


def test_a_step_is_descent_on_loss_and_penalty():
    push = Push(0.3, {A: np.concatenate([FIRST, SECOND], axis=-1)})

    def whole(params):
        loss = sum(
            jnp.vdot(g, p) for g, p in zip(*map(jax.tree.leaves, (GRADS, params)), strict=True)
        )
        a = flatten(params)[A]
        products = [jnp.swapaxes(old, -1, -2) @ a for old in (FIRST, SECOND)]
        return loss + 0.3 * sum(jnp.sum(product**2) for product in products)

    expected = jax.tree.map(lambda p, g: p - g, PARAMS, jax.grad(whole)(PARAMS))
    found = stepped(transform(push))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), found, expected
    )
    free = flatten(stepped(transform(None)))
    for path in (B, OTHER):
        assert np.array_equal(flatten(found)[path], free[path])
    assert not np.allclose(flatten(found)[A], free[A])


def test_an_orthogonal_factor_is_left_alone():
    basis = jnp.linalg.qr(jax.random.normal(jax.random.key(4), (6, 6)))[0]
    params = unflatten(flatten(PARAMS) | {A: jnp.stack([basis[:, :3]] * 2)})
    push = Push(10.0, {A: np.stack([basis[:, 3:]] * 2)})
    tx = transform(push)
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, GRADS), tx.init(params), params)
    for leaf in jax.tree.leaves(updates):
        np.testing.assert_allclose(leaf, 0.0, atol=1e-5)


def test_it_adds_to_a_pull():
    push, pull = Push(0.3, {A: FIRST}), Pull(l2sp=0.5)
    moved = unflatten({path: leaf + 1.0 for path, leaf in flatten(PARAMS).items()})

    def change(tx):
        return tx.update(GRADS, tx.init(PARAMS), moved)[0]

    alone = [change(transform(*args)) for args in ((push,), (None, pull), (None,))]
    both = change(transform(push, pull))
    expected = jax.tree.map(lambda a, b, c: a + b - c, *alone)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), both, expected
    )
