"""Optimizers: AdamW against its formula, the others by what they promise; groups, clip, frozen."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxtune.core.errors import RequestError
from jaxtune.core.tree import flatten, unflatten
from jaxtune.optim.schedules import make_schedule
from jaxtune.optim.transform import OptimSpec, make_transform
from jaxtune.peft.lora import Lora
from jaxtune.peft.method import FIXED, FROZEN, TRAINED

SHAPES = {
    "blocks/attn/q_proj/kernel": (2, 6, 4),
    "blocks/mlp/up_proj/lora/a": (2, 4, 3),
    "blocks/mlp/up_proj/lora/b": (2, 3, 4),
    "norm/scale": (5,),
}
OPTIMIZERS = ("adamw", "adafactor", "lion", "sgd", "muon")


def draw(seed: int) -> dict[str, jax.Array]:
    rng = np.random.default_rng(seed)
    return {p: jnp.asarray(rng.standard_normal(s), jnp.float32) for p, s in SHAPES.items()}


def transform(spec, schedule=None, kinds=None, scales=(), params=None):
    """The transformation of a nested tree, for trees of {path: leaf}."""
    schedule = make_schedule("constant", 0.1, 10) if schedule is None else schedule
    params = draw(0) if params is None else params
    labels = dict.fromkeys(params, TRAINED) if kinds is None else kinds
    tx = make_transform(spec, unflatten(labels), unflatten(params), schedule, scales)

    def update(gradients, state, params):
        updates, state = tx.update(unflatten(gradients), state, unflatten(params))
        return flatten(updates), state

    return optax.GradientTransformation(lambda params: tx.init(unflatten(params)), update)


def walk(tx, params, steps=5, gradients=draw):
    """The parameters after each step."""
    state, seen = tx.init(params), []
    for step in range(steps):
        updates, state = tx.update(gradients(step + 1), state, params)
        params = jax.tree.map(jnp.add, params, updates)
        seen.append(params)
    return seen


def adamw(params, steps, schedule, spec, settings):
    """Loshchilov and Hutter 2019 (arXiv:1711.05101) with clipping, in float64 numpy."""
    p = {k: np.asarray(v, np.float64) for k, v in params.items()}
    m = {k: np.zeros_like(v) for k, v in p.items()}
    v = {k: np.zeros_like(x) for k, x in p.items()}
    seen = []
    for step in range(steps):
        g = {k: np.asarray(x, np.float64) for k, x in draw(step + 1).items()}
        norm = math.sqrt(sum(np.sum(x * x) for x in g.values()))
        if spec.clip_norm is not None and norm > spec.clip_norm:
            g = {k: x * spec.clip_norm / norm for k, x in g.items()}
        for k in p:
            scale, decay = settings(k)
            m[k] = spec.b1 * m[k] + (1 - spec.b1) * g[k]
            v[k] = spec.b2 * v[k] + (1 - spec.b2) * g[k] ** 2
            m_hat = m[k] / (1 - spec.b1 ** (step + 1))
            v_hat = v[k] / (1 - spec.b2 ** (step + 1))
            update = m_hat / (np.sqrt(v_hat) + spec.eps) + decay * p[k]
            p[k] = p[k] - scale * float(schedule(step)) * update
        seen.append(dict(p))
    return seen


@pytest.mark.parametrize("clip", [None, 1.0, 100.0])
def test_adamw_equals_its_formula_with_groups_decay_clip_and_schedule(clip):
    spec = OptimSpec(
        b1=0.8,
        b2=0.95,
        eps=1e-6,
        weight_decay=0.2,
        clip_norm=clip,
        groups=((r"blocks/.*/lora/.*", 3.0, None), ("norm/.*", 0.5, 0.0)),
    )
    schedule = make_schedule("cosine", 0.05, 6, 2, 0.1)

    def settings(path):
        scale, decay = {"n": (0.5, 0.0)}.get(path[0], (1.0, 0.2))
        return (3.0, 0.2) if "lora" in path else (scale, decay)

    params = draw(0)
    found = walk(transform(spec, schedule), params)
    expected = adamw(params, 5, schedule, spec, settings)
    for ours, theirs in zip(found, expected, strict=True):
        for path in SHAPES:
            np.testing.assert_allclose(ours[path], theirs[path], rtol=2e-5, atol=1e-6, err_msg=path)


def test_lora_plus_multiplies_the_rate_of_b_and_of_its_group():
    """Hayou et al. 2024 (arXiv:2402.12354)."""
    spec = OptimSpec(clip_norm=None, groups=(("norm/scale", 2.0, None),))
    scales = Lora(ratio=16.0).learning_rate_scales()
    params = draw(0)
    plain = walk(transform(OptimSpec(clip_norm=None)), params, 1)[0]
    scaled = walk(transform(spec, scales=scales), params, 1)[0]
    expected = {"blocks/mlp/up_proj/lora/b": 16.0, "norm/scale": 2.0}
    for path, start in params.items():
        np.testing.assert_allclose(
            scaled[path] - start, expected.get(path, 1.0) * (plain[path] - start), rtol=1e-5
        )
    assert Lora().learning_rate_scales() == ()


def test_lower_layers_learn_at_lower_rates():
    """Of two blocks the first moves by half; what is above as ever, the embedding by 1/4."""
    params = draw(0) | {"embed/embedding": draw(5)["norm/scale"]}
    grads = draw(1) | {"embed/embedding": draw(6)["norm/scale"]}
    plain = transform(OptimSpec(clip_norm=None), params=params)
    slowed = transform(OptimSpec(clip_norm=None, layer_decay=0.5), params=params)
    one, two = (tx.update(grads, tx.init(params), params)[0] for tx in (plain, slowed))
    for path, update in one.items():
        if path.startswith("blocks/"):
            wanted = update * np.array([0.5, 1.0]).reshape(2, 1, 1)
        else:
            wanted = update * (0.25 if path.startswith("embed/") else 1.0)
        np.testing.assert_allclose(two[path], wanted, rtol=1e-6, err_msg=path)


def test_the_first_group_that_matches_counts():
    spec = OptimSpec(clip_norm=None, groups=(("norm/.*", 0.0, None), (".*", 5.0, None)))
    params = draw(0)
    plain = walk(transform(OptimSpec(clip_norm=None)), params, 1)[0]
    scaled = walk(transform(spec), params, 1)[0]
    assert np.array_equal(scaled["norm/scale"], params["norm/scale"])
    path = "blocks/attn/q_proj/kernel"
    np.testing.assert_allclose(
        scaled[path] - params[path], 5 * (plain[path] - params[path]), rtol=1e-5
    )


def test_a_group_that_matches_nothing_trained_is_refused():
    kinds = dict.fromkeys(SHAPES, FROZEN) | {"norm/scale": TRAINED}
    params = {p: leaf if kinds[p] == TRAINED else None for p, leaf in draw(0).items()}
    with pytest.raises(RequestError, match=r"optim.groups: regex 'blocks/.\*' matches no trained"):
        transform(OptimSpec(groups=(("blocks/.*", 1.0, None),)), kinds=kinds, params=params)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_is_not_trained_gets_no_update_and_no_state(name):
    """`optax.masked` passes the raw gradient of a frozen leaf through; nothing may."""
    kinds = dict.fromkeys(SHAPES, TRAINED)
    kinds |= {"blocks/attn/q_proj/kernel": FROZEN, "blocks/mlp/up_proj/lora/a": FIXED}
    tx = transform(OptimSpec(name=name, weight_decay=0.5), kinds=kinds)
    state = tx.init(draw(0))
    updates, _ = tx.update(draw(1), state, draw(0))
    for path, kind in kinds.items():
        assert np.any(updates[path] != 0) == (kind == TRAINED), path
    elements = sum(leaf.size for leaf in jax.tree.leaves(state) if leaf.ndim)
    most = sum(np.prod(SHAPES[path]) for path, kind in kinds.items() if kind == TRAINED)
    # two moments at most; adafactor's placeholders have one element each
    assert elements <= 2 * most + 6


@pytest.mark.parametrize("clip", [None, 0.5])
def test_clipping_bounds_the_global_norm_of_the_trained_gradients(clip):
    tx = transform(OptimSpec(name="sgd", momentum=0.0, clip_norm=clip))
    params, gradients = draw(0), draw(1)
    updates, _ = tx.update(gradients, tx.init(params), params)
    norm = math.sqrt(sum(float(jnp.sum(g**2)) for g in gradients.values()))
    factor = 1.0 if clip is None else clip / norm
    for path in SHAPES:
        np.testing.assert_allclose(updates[path], -0.1 * factor * gradients[path], rtol=1e-5)


# A hundred steps of rate 0.1: enough for those whose step has a fixed size (lion, muon).
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_lowers_a_loss(name):
    target, params = draw(5), draw(0)

    def loss(params):
        return sum(jnp.sum((params[p] - target[p]) ** 2) for p in SHAPES) / 2

    tx = transform(OptimSpec(name=name, clip_norm=None, momentum=0.5))
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return jax.tree.map(jnp.add, params, updates), state

    before = float(loss(params))
    for _ in range(100):
        params, state = step(params, state)
    assert float(loss(params)) < 0.3 * before


def test_lion_moves_every_element_by_the_rate():
    """Chen et al. 2023 (arXiv:2302.06675): the update is a sign."""
    params = draw(0)
    tx = transform(OptimSpec(name="lion", b2=0.99, clip_norm=None))
    updates, _ = tx.update(draw(1), tx.init(params), params)
    for path, update in updates.items():
        np.testing.assert_allclose(update, -0.1 * np.sign(draw(1)[path]), rtol=1e-6)


def test_sgd_has_heavy_ball_momentum():
    params = draw(0)
    found = walk(transform(OptimSpec(name="sgd", momentum=0.5, clip_norm=None)), params, 2)[-1]
    for path, start in params.items():
        g1, g2 = draw(1)[path], draw(2)[path]
        np.testing.assert_allclose(found[path], start - 0.1 * (g1 + g2 + 0.5 * g1), rtol=1e-4)


def test_adafactor_keeps_rows_and_columns_and_scales_to_the_parameter():
    """Shazeer and Stern 2018 (arXiv:1804.04235)."""
    params = {"blocks/mlp/up_proj/kernel": 3 * jnp.ones((2, 256, 128))}
    gradients = {"blocks/mlp/up_proj/kernel": jax.random.normal(jax.random.key(0), (2, 256, 128))}
    tx = transform(OptimSpec(name="adafactor", clip_norm=None), params=params)
    state = tx.init(params)
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) < 2 * (256 + 128) + 8
    updates, _ = tx.update(gradients, state, params)
    rms = float(jnp.sqrt(jnp.mean(updates["blocks/mlp/up_proj/kernel"] ** 2)))
    assert rms == pytest.approx(0.1 * 3, rel=0.02)  # lr · rms(parameter) · an update of rms 1


def test_muon_updates_of_matrices_are_orthogonal():
    """Jordan et al. 2024; the size is Adam's, 0.2 √max(in, out) (arXiv:2502.16982)."""
    params = draw(0)
    tx = transform(OptimSpec(name="muon", momentum=0.95, clip_norm=None))
    updates, _ = tx.update(draw(1), tx.init(params), params)
    for path, update in updates.items():
        if path == "norm/scale":
            np.testing.assert_allclose(jnp.abs(update), 0.1, rtol=1e-4)  # Adam's first step
            continue
        size = 0.1 * 0.2 * math.sqrt(max(SHAPES[path][-2:]))
        singular = np.linalg.svd(np.asarray(update))[1] / size
        # five Newton-Schulz rounds bring each singular value near 1
        assert np.all((singular > 0.6) & (singular < 1.3)), (path, singular)
