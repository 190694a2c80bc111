"""Which experts compute a token, and how evenly they share the work."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxtune.models.config import Experts
from jaxtune.models.expert_parallel import Names, total


class Routing(NamedTuple):
    """Where tokens were sent: weights float32 [..., k], chosen int32 [..., k], probs [..., E]."""

    weights: jax.Array
    chosen: jax.Array
    probabilities: jax.Array


def route(
    experts: Experts, x: jax.Array, router: dict[str, jax.Array], summed: Names = ()
) -> Routing:
    """Returns the experts of each token x [..., D], in float32.

    Args:
        experts: how tokens are sent.
        x: [..., D].
        router: kernel [D, E], and where it has them bias [E], a [D, r] and b [r, E].
        summed: mesh axes that split D.
    """

    def product(h: jax.Array, kernel: jax.Array) -> jax.Array:
        return jnp.einsum("...d,de->...e", h, kernel, preferred_element_type=jnp.float32)

    scores = total(product_with(product, x, router), summed)
    if "bias" in router:
        scores = scores + router["bias"].astype(jnp.float32)
    probabilities = jax.nn.softmax(scores)
    weights, chosen = jax.lax.top_k(probabilities, experts.per_token)
    if experts.normalise:
        weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    return Routing(weights, chosen, probabilities)


def product_with(
    product: Callable[[jax.Array, jax.Array], jax.Array], h: jax.Array, leaves: dict[str, jax.Array]
) -> jax.Array:
    """Returns h times (kernel + a b), which is never built."""
    y = product(h, leaves["kernel"])
    return y + product(product(h, leaves["a"]), leaves["b"]) if "a" in leaves else y


def balance(routing: Routing, real: jax.Array) -> jax.Array:
    """Returns the load-balancing loss of each row, float32 [B]; 1 when all experts share alike k=1.

    E · Σ_e f_e · P_e over the row's real tokens, f_e being how often a token chose expert e and
    P_e the router's mean probability (Fedus et al. 2021, arXiv:2101.03961, eq. 4–6). A row at a
    time, so that neither micro-batches nor devices change it.

    Args:
        routing: of [B, T] tokens.
        real: bool [B, T], False for padding.
    """
    count = routing.probabilities.shape[-1]
    weight = real / jnp.maximum(jnp.sum(real, axis=1, keepdims=True), 1)
    sent = jnp.sum(jax.nn.one_hot(routing.chosen, count), axis=-2)  # [B, T, E]
    share = jnp.einsum("bt,bte->be", weight, sent)
    mean = jnp.einsum("bt,bte->be", weight, routing.probabilities)
    return count * jnp.sum(share * mean, axis=-1)
