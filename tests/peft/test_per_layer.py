"""LoRA whose layers differ in rank and scale: the sum of each, and padding that stays zero."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxtune.core.tree import flatten, unflatten
from jaxtune.models.decoder import hidden_states, logits
from jaxtune.peft.lora import Lora
from jaxtune.peft.method import TRAINED, labels
from tests.checkpoints.world import CONFIG, batch_of, probe, random_params

METHOD = Lora(rank=4, alpha=3.0, targets=("q_proj",), per_layer=True)
PLACE = "blocks/attn/q_proj"
SCALES = np.array([2.0, 0.5, 1.0], np.float32)


def padded_params():
    """Layer 0 has rank 4, layer 1 rank 2, layer 2 none."""
    flat = flatten(random_params(CONFIG, METHOD))
    used = np.arange(4) < np.array([4, 2, 0])[:, None]
    flat[f"{PLACE}/lora/a"] = jnp.where(used[:, None, :], flat[f"{PLACE}/lora/a"], 0.0)
    flat[f"{PLACE}/lora/b"] = jnp.where(used[:, :, None], flat[f"{PLACE}/lora/b"], 0.0)
    return flat | {f"{PLACE}/lora/scale": jnp.asarray(SCALES)}


def test_each_layer_has_its_scale_merged_or_not():
    flat, batch = padded_params(), batch_of(METHOD, probe())
    merged = METHOD.merge(unflatten(flat))
    a, b, kernel = (np.asarray(flat[f"{PLACE}/{n}"]) for n in ("lora/a", "lora/b", "kernel"))
    for layer, scale in enumerate(SCALES):
        expected = kernel[layer] + scale * a[layer] @ b[layer]
        got = merged["blocks"]["attn"]["q_proj"]["kernel"][layer]
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)

    @functools.partial(jax.jit, static_argnums=0)
    def run(method, params):
        return logits(CONFIG, method, params, hidden_states(CONFIG, method, params, batch)[0])

    apart, folded = run(METHOD, unflatten(flat)), run(Lora(targets=("absent",)), merged)
    np.testing.assert_allclose(apart, folded, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_training_leaves_padding_and_scales_alone(name):
    flat, batch = padded_params(), batch_of(METHOD, probe())
    kinds = flatten(labels(METHOD, unflatten(flat)))
    trained = {path: leaf for path, leaf in flat.items() if kinds[path] == TRAINED}
    assert set(trained) == {f"{PLACE}/lora/a", f"{PLACE}/lora/b"}
    optimizer = optax.adamw(1e-2) if name == "adamw" else optax.contrib.muon(1e-2)

    @jax.jit
    def step(trained, state):
        def loss(trained):
            params = unflatten(flat | trained)
            hidden = hidden_states(CONFIG, METHOD, params, batch)[0]
            return jnp.mean(logits(CONFIG, METHOD, params, hidden) ** 2)

        updates, state = optimizer.update(jax.grad(loss)(trained), state, trained)
        return optax.apply_updates(trained, updates), state

    state, new = optimizer.init(trained), trained
    for _ in range(3):
        new, state = step(new, state)
    for path, leaf in new.items():
        was, now = np.asarray(trained[path]), np.asarray(leaf)
        assert np.all(now[was == 0.0] == 0.0), path
        assert np.all(now[was != 0.0] != was[was != 0.0]), path
