"""From the logits of one position to a token id."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def sample(
    logits: jax.Array,
    keys: jax.Array,
    temperature: jax.Array | float,
    top_k: jax.Array | int,
    top_p: jax.Array | float,
) -> jax.Array:
    """Returns one token id for each row, int32 [B].

    Temperature, then top-k, then top-p over what top-k left, as transformers orders them. The three
    settings are runtime scalars: changing them compiles nothing.

    Args:
        logits: float32 [B, V].
        keys: random keys [B]; a row's draw depends on its own key and logits only.
        temperature: divides the logits; 0 takes the largest logit.
        top_k: keeps the k largest logits, and what ties with the k-th; 0 keeps all.
        top_p: keeps the likeliest tokens up to and including the one whose cumulative probability
            reaches p (nucleus sampling, Holtzman et al. 2019, arXiv:1904.09751); 1 keeps all.
    """
    temperature = jnp.asarray(temperature, jnp.float32)

    def greedy():
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def drawn():
        # Without its maximum first, a tiny temperature would overflow the row.
        scores = (logits - jnp.max(logits, axis=-1, keepdims=True)) / temperature
        # The noise belongs to token ids, so that a filter which removes nothing changes nothing.
        noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[-1:]))(keys)
        narrowed = (jnp.asarray(top_k) > 0) | (jnp.asarray(top_p) < 1.0)
        return jax.lax.cond(narrowed, filtered, everything, scores, noise)

    def everything(scores, noise):
        return jnp.argmax(scores + noise, axis=-1).astype(jnp.int32)

    def filtered(scores, noise):
        order = jnp.argsort(scores, axis=-1, descending=True)
        ranked = nucleus(jnp.take_along_axis(scores, order, axis=-1), top_k, top_p)
        best = jnp.argmax(ranked + jnp.take_along_axis(noise, order, axis=-1), axis=-1)
        return jnp.take_along_axis(order, best[:, None], axis=-1)[:, 0].astype(jnp.int32)

    return jax.lax.cond(temperature > 0.0, drawn, greedy)


def nucleus(ranked: jax.Array, top_k: jax.Array | int, top_p: jax.Array | float) -> jax.Array:
    """Returns `ranked` with what top-k and top-p leave out at -inf.

    Args:
        ranked: float32 [B, V] scores, each row in descending order.
        top_k, top_p: as in `sample`.
    """
    count = ranked.shape[-1]
    top_k, top_p = jnp.asarray(top_k, jnp.int32), jnp.asarray(top_p, jnp.float32)
    smallest = jnp.take(ranked, jnp.clip(top_k - 1, 0, count - 1), axis=-1)[:, None]
    ranked = jnp.where((top_k <= 0) | (ranked >= smallest), ranked, -jnp.inf)
    probabilities = jax.nn.softmax(ranked, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    kept = (top_p >= 1.0) | (before < top_p) | (jnp.arange(count) == 0)
    return jnp.where(kept, ranked, -jnp.inf)


def row_keys(seed: int, first_row: int, count: int) -> jax.Array:
    """Returns the keys of rows first_row … first_row + count - 1, a key array [count]."""
    rows = jnp.arange(first_row, first_row + count)
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(jax.random.key(seed), rows)


def step_keys(keys: jax.Array, step: jax.Array | int) -> jax.Array:
    """Returns the rows' keys [B] for one new token; `step` is one number, or one a row [B]."""
    return jax.vmap(jax.random.fold_in)(keys, jnp.broadcast_to(step, keys.shape))
