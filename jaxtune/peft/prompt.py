"""Prompt tuning: trained virtual tokens in front of each example."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from jaxtune.core.tree import Rules, Tree
from jaxtune.peft.method import TRAINED, Method, Probe, param


class PromptSlot(nnx.Module):
    """Holds `embedding` [P, D]."""

    def __init__(self, num_tokens: int, d_model: int, rngs: nnx.Rngs):
        table = 0.02 * jax.random.normal(rngs.params(), (num_tokens, d_model), jnp.float32)
        self.embedding = param(table, None, "embed")

    def __call__(self, embedded, virtual):
        """embedded [B, T, D], virtual int32 [B, T] → embedded, replaced where virtual ≥ 0."""
        rows = self.embedding[...].astype(embedded.dtype)[jnp.maximum(virtual, 0)]
        return jnp.where((virtual >= 0)[..., None], rows, embedded)


@dataclasses.dataclass(frozen=True)
class Prompt(Method):
    """Lester et al. 2021 (arXiv:2104.08691).

    Attributes:
        num_tokens: P, the virtual tokens; they take P positions of each example.
        init: "vocab" copies the embeddings of random vocabulary entries, "text" those of
            `init_ids` (repeated or cut to P), "random" draws from N(0, 0.02²).
        init_ids: token ids of the start text.
    """

    name: ClassVar[str] = "prompt"
    mergeable: ClassVar[bool] = False
    starts_as_base: ClassVar[bool] = False
    num_tokens: int = 20
    init: str = "vocab"
    init_ids: tuple[int, ...] = ()

    @property
    def num_virtual(self) -> int:
        """P slots a segment."""
        return self.num_tokens

    def embedding(self, d_model, rngs):
        """Returns the PromptSlot."""
        return PromptSlot(self.num_tokens, d_model, rngs)

    def rules(self) -> Rules:
        """The prompt is trained."""
        return ((r"prompt/embedding", TRAINED),)

    def start(self, params: Tree, key: jax.Array, probe: Probe) -> Tree:
        """Copies rows of the base's embedding table."""
        del probe
        if self.init == "random":
            return params
        table = params["embed"]["embedding"]
        if self.init == "text":
            repeats = -(-self.num_tokens // len(self.init_ids))
            ids = jnp.asarray((self.init_ids * repeats)[: self.num_tokens])
        else:
            ids = jax.random.randint(key, (self.num_tokens,), 0, table.shape[0])
        return params | {"prompt": {"embedding": table[ids].astype(jnp.float32)}}
