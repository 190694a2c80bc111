"""The decoder: one set of modules for every family."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxtune.models import functional
from jaxtune.models.attention import ATTENDED, Span
from jaxtune.models.block import Block
from jaxtune.models.cache import Cache, write_span
from jaxtune.models.call import shared_by_layers
from jaxtune.models.config import ModelConfig
from jaxtune.models.layers import Linear, Norm
from jaxtune.parallel.rules import constrain
from jaxtune.peft.method import Method, named_key, param


class Hidden(NamedTuple):
    """What the decoder gives.

    Attributes:
        states: [B, T, D] behind the last norm, in the compute dtype.
        cache: with the new tokens, or None without one.
        balance: load-balancing loss of each row, mean over the layers, float32 [B]; None without
            experts.
    """

    states: jax.Array
    cache: Cache | None
    balance: jax.Array | None


class Decoder(nnx.Module):
    """Token ids to hidden states, and hidden states to logits."""

    def __init__(self, config: ModelConfig, method: Method, rngs: nnx.Rngs):
        c, std = config, config.initializer_range
        table = std * jax.random.normal(rngs.params(), (c.vocab_size, c.hidden_size), jnp.float32)
        self.embed = nnx.Dict(embedding=param(table, "vocab", "embed"))
        if c.learned_positions:
            shape = (c.max_position_embeddings, c.hidden_size)
            table = std * jax.random.normal(rngs.params(), shape, jnp.float32)
            self.embed["positions"] = param(table, None, "embed")
        keys = jax.random.split(rngs.params(), c.num_layers)
        self.blocks = functional.stack(lambda k: Block(c, method, nnx.Rngs(k)), keys)
        self.final_norm = Norm(c, c.hidden_size)
        shape, axes = (c.hidden_size, c.vocab_size), ("embed", "vocab")
        own = c.lm_head and not c.tie_embeddings
        head = Linear(c, method, "lm_head", shape, axes, False, rngs) if own else None
        self.lm_head = head
        # From 0: every score starts equal, whatever the width, and a value function at 0.
        zeros = jnp.zeros((c.hidden_size, 1), jnp.float32)
        self.score = nnx.Dict(kernel=param(zeros, "embed", None)) if c.score_head else None
        self.prompt = method.embedding(c.hidden_size, rngs)
        if method.new_rows is not None:
            count = method.new_rows[1]
            self.embed["added"] = param(jnp.zeros((count, c.hidden_size)), None, "embed")
            if head is not None:
                self.lm_head.added = param(jnp.zeros((c.hidden_size, count)), "embed", None)
        self.config, self.offset, self.new_rows = c, method.position_offset, method.new_rows

    def hidden(self, batch, cache: Cache | None, key: jax.Array | None):
        """Returns the hidden states of a batch; see `hidden_states`."""
        c = self.config
        queries = Span(batch["segment_ids"], batch["positions"] + self.offset)
        # Gathered along fsdp like every weight: looked up in columns, the rows of a batch would
        # have to change places between devices.
        table = constrain(self.embed["embedding"][...].astype(c.compute_dtype), "vocab", None)
        x = table[batch["input_ids"]]
        if self.new_rows is not None:
            start, count = self.new_rows
            place = batch["input_ids"] - start
            own = self.embed["added"][...].astype(x.dtype)[jnp.clip(place, 0, count - 1)]
            x = jnp.where(((place >= 0) & (place < count))[..., None], own, x)
        if self.prompt is not None:
            x = self.prompt(x, batch["virtual"])
        if c.embedding_scale != 1.0:
            x = x * jnp.asarray(c.embedding_scale, x.dtype)
        if c.learned_positions:
            x = x + self.embed["positions"][...].astype(x.dtype)[queries.positions]
        x = constrain(x, "batch", "tokens", None)
        keys = queries if cache is None else write_span(cache, queries)
        length, branches = None if cache is None else cache.length, batch.get("branches")
        call = shared_by_layers(c, queries, keys, length, branches)

        def layer(block: Block, carry, xs):
            (x, kv, uneven), (number, kind) = carry, xs
            layer_key = None if key is None else jax.random.fold_in(key, number)
            cached = None if kv is None else (*kv, number)
            x, cached, more = block(x, call.of(kind), cached, layer_key)
            x = constrain(x, "batch", "tokens", None)
            kv = None if kv is None else cached[:2]
            return x, kv, uneven if more is None else uneven + more / c.num_layers

        kv = None if cache is None else (cache.keys, cache.values)
        uneven = None if c.experts is None else jnp.zeros(x.shape[0], jnp.float32)
        x, kv, uneven = functional.scan_layers(
            self.blocks,
            layer,
            (x, kv, uneven),
            (jnp.arange(c.num_layers), jnp.asarray(c.layer_kinds)),
            functools.partial(rematerialised, policy=c.remat),
        )
        x = self.final_norm(x)
        if cache is not None:
            cache = Cache(kv[0], kv[1], *keys, cache.length + x.shape[1])
        return Hidden(x, cache, uneven)

    def logits(self, hidden: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """Returns float32 [..., V] for hidden [..., D]."""
        c = self.config
        if not c.lm_head:
            raise ValueError("a model without lm_head has no logits")
        if self.lm_head is not None:
            scores = self.lm_head(hidden, named_key(key, "lm_head")).astype(jnp.float32)
        else:
            table = self.embed["embedding"][...].astype(hidden.dtype)
            scores = jnp.einsum("...d,vd->...v", hidden, table, preferred_element_type=jnp.float32)
        if self.new_rows is not None:
            scores = self._with_new_columns(scores, hidden)
        if c.logits_scale != 1.0:
            scores = scores * c.logits_scale
        if c.final_softcap is not None:
            scores = c.final_softcap * jnp.tanh(scores / c.final_softcap)
        return scores

    def scores(self, hidden: jax.Array) -> jax.Array:
        """Returns float32 [...] for hidden [..., D]."""
        kernel = self.score["kernel"][...].astype(jnp.float32)
        return jnp.einsum("...d,do->...o", hidden.astype(jnp.float32), kernel)[..., 0]

    def _with_new_columns(self, scores: jax.Array, hidden: jax.Array) -> jax.Array:
        """Returns logits [..., V] with those of new tokens from their own rows."""
        own = self.embed["added"][...].T if self.lm_head is None else self.lm_head.added[...]
        new = jnp.einsum(
            "...d,dn->...n", hidden, own.astype(hidden.dtype), preferred_element_type=jnp.float32
        )
        return jax.lax.dynamic_update_slice_in_dim(scores, new, self.new_rows[0], scores.ndim - 1)


def rematerialised(body, policy: str):
    """Returns the scan body under the remat policy of `ModelConfig.remat`."""
    if policy == "none":
        return body
    known = jax.checkpoint_policies
    dots = known.save_from_both_policies(
        known.dots_with_no_batch_dims_saveable, known.save_only_these_names(ATTENDED)
    )
    return jax.checkpoint(body, policy=dots if policy == "dots" else None, prevent_cse=False)


# -- the functional face ------------------------------------------------------------------------


@functools.cache
def _abstract(config: ModelConfig, method: Method) -> nnx.Module:
    return nnx.eval_shape(lambda: Decoder(config, method, nnx.Rngs(0)))


@functools.cache
def _graphdef(config: ModelConfig, method: Method):
    return functional.split(_abstract(config, method))[0]


def abstract_params(config: ModelConfig, method: Method):
    """Returns the parameter tree as float32 ShapeDtypeStructs."""
    return functional.split(_abstract(config, method))[1]


def param_axes(config: ModelConfig, method: Method):
    """Returns the logical axes of each parameter, a tuple of names a leaf."""
    return functional.logical_axes(_abstract(config, method))


def init_params(config: ModelConfig, method: Method, key: jax.Array):
    """Returns random float32 parameters; `method.start` has still to see the base's weights."""
    return functional.split(Decoder(config, method, nnx.Rngs(key)))[1]


def hidden_states(config, method, params, batch, *, cache=None, key=None) -> Hidden:
    """Runs the decoder on a batch.

    Args:
        config: ModelConfig.
        method: the peft Method that built the parameters.
        params: nested dict of parameters, any float dtype.
        batch: input_ids, segment_ids, positions int32 [B, T]; `virtual` too with prompt tuning,
            `branches` too where completions share a prompt.
        cache: Cache to read and extend, or None.
        key: dropout key, or None to turn dropout off.

    Returns:
        Hidden(states, cache, balance).
    """
    return functional.merge(_graphdef(config, method), params).hidden(batch, cache, key)


def logits(config, method, params, hidden, *, key=None):
    """Returns float32 logits [..., V] of hidden states [..., D]."""
    return functional.merge(_graphdef(config, method), params).logits(hidden, key)


def scores(config, method, params, hidden):
    """Returns float32 scores [...] of hidden states [..., D], by a model with `score_head`.

    The head has no bias, is float32 and computes in float32. What a score stands for is the
    objective's: a reward at a completion's last token, or the value of each token's state.
    """
    return functional.merge(_graphdef(config, method), params).scores(hidden)


def head_path(config: ModelConfig) -> tuple[str, str]:
    """Returns where the head's weights are: those of the embedding, if they are tied."""
    return ("embed", "embedding") if config.tie_embeddings else ("lm_head", "kernel")


def with_gathered_head(config: ModelConfig, frozen):
    """Returns the frozen parameters with the head's weights whole along `fsdp`, if they are there.

    The loss multiplies with them once for each of its chunks, forwards and backwards: spread, they
    would be gathered as often. A trained head stays spread, for its gradient is added up in
    float32 where the head lies.
    """
    node, leaf = head_path(config)
    weights = frozen.get(node, {}).get(leaf)
    if weights is None or isinstance(weights, dict):
        return frozen
    axes = ("vocab", None) if config.tie_embeddings else (None, "vocab")
    return {**frozen, node: {**frozen[node], leaf: constrain(weights, *axes)}}
