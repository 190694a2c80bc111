"""C23 through the model: over all completions that there are, the loss's mean gradient is exact.

A model of five tokens writes two, so that its 25 completions can be listed, each weighted with its
probability. What the gradient is the mean of is then known in closed form.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune.core.tree import combine, flatten
from jaxtune.models import decoder
from jaxtune.models.config import ModelConfig
from jaxtune.recipes import grpo, online
from jaxtune.recipes.base import BASE
from jaxtune.recipes.reference import base_of
from jaxtune.recipes.rows import Rows
from jaxtune.recipes.schema.resolve import resolve
from jaxtune.training.step import mean_loss, terms
from tests.correctness.small import CONFIG, small
from tests.rl.tiny import run_config

pytestmark = pytest.mark.slow

V, HEAT, COEF = 5, 0.7, 0.4
PROMPT = (3, 1)
COMPLETIONS = tuple(itertools.product(range(V), repeat=2))
FIRST, WIDTH = len(PROMPT), len(PROMPT) + 2
REWARDS = np.random.default_rng(0).normal(size=len(COMPLETIONS))


@functools.cache
def world():
    """(model with an adapter that does something, its trained and its frozen part)."""
    model = small("lora", ModelConfig(**vars(CONFIG) | {"vocab_size": V, "num_layers": 1}))
    return model, *model.parts.split(model.params)


def rows() -> dict[str, np.ndarray]:
    """The inputs of every completion, a row each."""
    ids = np.array([(*PROMPT, *new) for new in COMPLETIONS], np.int32)
    place = np.broadcast_to(np.arange(WIDTH, dtype=np.int32), ids.shape)
    return {"input_ids": ids, "segment_ids": np.ones_like(ids), "positions": place}


def tables(trainable, frozen) -> tuple[jax.Array, jax.Array]:
    """ln p and ln q [25, 2, V] at both places of each completion, of policy and reference."""
    model, *_ = world()
    config, params = model.parts.config, combine(trainable, frozen)
    found = []
    for method, held in ((model.method, params), (BASE, base_of(config, params))):
        states = decoder.hidden_states(config, method, held, rows()).states
        logits = decoder.logits(config, method, held, states[:, FIRST - 1 : -1])
        found.append(jax.nn.log_softmax(logits / HEAT))
    return found[0], jax.lax.stop_gradient(found[1])


def chosen(table) -> jax.Array:
    """The completions' own tokens [25, 2] in a table [25, 2, V]."""
    return jnp.take_along_axis(table, jnp.array(COMPLETIONS)[:, :, None], axis=2)[:, :, 0]


@functools.cache
def drawn() -> tuple[np.ndarray, np.ndarray]:
    """The tokens' ln p and ln q [25, 2]."""
    _, trainable, frozen = world()
    run = jax.jit(lambda *params: tuple(chosen(table) for table in tables(*params)))
    return tuple(map(np.asarray, run(trainable, frozen)))


def config_of(directory, estimator: str, place: str) -> Any:
    changes = {"objective__kl_estimator": estimator, "objective__kl_in": place}
    changes |= {"objective__variant": "dapo", "objective__advantage": "group_mean"}
    changes |= {"objective__kl_coef": COEF, "objective__temperature": HEAT}
    return resolve(run_config(directory, **changes))


def batch_of(config: Any) -> dict[str, np.ndarray]:
    """What an iteration makes of all completions; a token weighs what its row is probable."""
    shape, names = (len(COMPLETIONS), WIDTH), online.keys_of(config.objective)
    batch = {name: np.zeros(shape, np.float32) for name in (*names, "loss_mask")}
    batch["completions"] = np.zeros(shape, np.int32)
    seen = {name: np.zeros(shape, np.float32) for name in ("logprobs", "ref_logprobs")}
    for array, values in zip(seen.values(), drawn(), strict=True):
        array[:, FIRST:] = values
    batch |= rows() | {"old_logprobs": seen["logprobs"], "ref_logprobs": seen["ref_logprobs"]}
    batch["completions"][:, FIRST:] = batch["loss_mask"][:, FIRST:] = 1
    given = grpo.credit(config.objective, REWARDS[None], batch, seen, COEF)
    batch["loss_mask"][:, FIRST:] = np.exp(drawn()[0].sum(1, keepdims=True))
    if config.objective.kl_in == "loss":
        batch["kl_coef"][:] = COEF
    return batch | given.arrays


@functools.cache
def gradients_by_hand() -> dict[str, dict[str, np.ndarray]]:
    """{what: {path: gradient}} of what the loss may descend, each over a completion's two tokens.

    `reward`: the mean reward. `forward` and `backward`: KL(p‖q) and KL(q‖p) of the next token,
    a mean over the prefixes, of which it is not differentiated how likely they are. `completions`:
    KL(p‖q) of whole completions.
    """
    _, trainable, frozen = world()

    def all_of_them(trainable):
        logp, logq = tables(trainable, frozen)
        whole, other = chosen(logp).sum(1), chosen(logq).sum(1)
        p = jnp.exp(whole)
        fixed = jax.lax.stop_gradient(p)[:, None]
        forward = jnp.sum(jnp.exp(logp) * (logp - logq), axis=2)
        backward = jnp.sum(jnp.exp(logq) * (logq - logp), axis=2)
        found = {
            "reward": jnp.sum(p * REWARDS),
            "forward": jnp.sum(fixed * forward),
            "backward": jnp.sum(fixed * backward),
            "completions": jnp.sum(p * (whole - other)),
        }
        return {name: value / 2 for name, value in found.items()}

    found = jax.jit(jax.jacrev(all_of_them))(trainable)
    return {
        name: {path: np.asarray(g) for path, g in flatten(tree).items() if g is not None}
        for name, tree in found.items()
    }


@pytest.mark.parametrize(
    ("estimator", "place", "divergence"),
    [
        ("k1", "loss", "forward"),
        ("k2", "loss", "forward"),
        ("k3", "loss", "backward"),
        ("exact", "loss", "forward"),
        ("k1", "reward", "completions"),
    ],
)
def test_the_mean_gradient_is_that_of_reward_less_divergence(
    estimator, place, divergence, tmp_path
):
    model, trainable, frozen = world()
    config = config_of(tmp_path, estimator, place)
    loss, batch = grpo.grpo_loss(config, model.parts, Rows(1)), batch_of(config)
    found = jax.jit(
        jax.grad(lambda trainable: mean_loss(terms(loss(trainable, frozen, batch, None)[0])))
    )(trainable)
    known = gradients_by_hand()
    for path, gain in known["reward"].items():
        pull = COEF * known[divergence][path]
        size = np.abs(pull).max()  # of the divergence's own part, which nothing else may hide
        np.testing.assert_allclose(
            flatten(found)[path], pull - gain, rtol=0, atol=1e-3 * size, err_msg=path
        )
