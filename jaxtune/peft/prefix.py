"""Prefix tuning: trained keys and values that every token attends to, in every layer."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from jaxtune.core.tree import Rules, Tree
from jaxtune.peft.method import TRAINED, Method, Probe, param


class PrefixSlot(nnx.Module):
    """Holds `key` and `value` [P, K*H]; keys are in rotated space, as peft stores them."""

    def __init__(self, num_tokens: int, kv_width: int, rngs: nnx.Rngs):
        shape = (num_tokens, kv_width)
        key = 0.02 * jax.random.normal(rngs.params(), shape, jnp.float32)
        value = 0.02 * jax.random.normal(rngs.params(), shape, jnp.float32)
        self.key = param(key, None, "kv_heads")
        self.value = param(value, None, "kv_heads")


@dataclasses.dataclass(frozen=True)
class Prefix(Method):
    """Li and Liang 2021 (arXiv:2101.00190), without the reparametrising network.

    The start is the keys and values of random vocabulary entries run through the base (their
    section 7.4: real activations start far better than random numbers). Not the identity.

    Attributes:
        num_tokens: P, the prefix length; real tokens start at position P.
    """

    name: ClassVar[str] = "prefix"
    mergeable: ClassVar[bool] = False
    starts_as_base: ClassVar[bool] = False
    num_tokens: int = 20

    @property
    def position_offset(self) -> int:
        """Real tokens follow the P prefix positions."""
        return self.num_tokens

    def attention(self, kv_width, rngs):
        """Returns the PrefixSlot of one layer."""
        return PrefixSlot(self.num_tokens, kv_width, rngs)

    def rules(self) -> Rules:
        """Keys and values are trained."""
        return ((r".*/prefix/(key|value)", TRAINED),)

    def start(self, params: Tree, key: jax.Array, probe: Probe) -> Tree:
        """Runs P random vocabulary entries through the base."""
        vocab = params["embed"]["embedding"].shape[0]
        keys, values = probe(jax.random.randint(key, (1, self.num_tokens), 0, vocab))
        attn = params["blocks"]["attn"]
        prefix = {"key": keys.astype(jnp.float32), "value": values.astype(jnp.float32)}
        return params | {"blocks": params["blocks"] | {"attn": attn | {"prefix": prefix}}}
