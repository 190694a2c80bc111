"""The decoder: one set of modules for every family."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxtune.models import functional
from jaxtune.models.attention import ATTENDED, Span, Where, visible
from jaxtune.models.attention_backends import backend
from jaxtune.models.cache import Cache, write_column, write_span
from jaxtune.models.config import ModelConfig
from jaxtune.models.experts import ExpertMlp
from jaxtune.models.layers import ACTIVATIONS, Linear, Norm, gated_activation
from jaxtune.models.rope import angles, rotate
from jaxtune.models.routing import balance
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


@dataclasses.dataclass(frozen=True)
class Call:
    """What the layers of one forward pass share; one entry for each kind of layer where stacked.

    Attributes:
        queries, keys: where the new tokens and all tokens stand.
        windows: of each kind.
        masks: bool [kinds, B, T, S], or None for a back end that does without.
        angles: float32 [kinds, 2, B, T, 1, R / 2] of the new tokens, or None without rotation.
        key_angles: the same of all keys [.., B, S, ..], where angles follow the segment's length
            and cached keys therefore wait for their rotation; else None.
        length: the cache's, or None without one.
        kind: the layer's, an index that may be traced; None before a layer is chosen.
    """

    queries: Span
    keys: Span
    windows: tuple[int | None, ...]
    masks: jax.Array | None
    angles: jax.Array | None
    key_angles: jax.Array | None
    length: jax.Array | None
    kind: jax.Array | int | None = None

    def of(self, kind: jax.Array) -> Call:
        """Returns what a layer of one kind reads."""
        if len(self.windows) == 1:
            kind = 0  # a slice that is known costs nothing
        stacked = {
            name: None if array is None else array[kind]
            for name in ("masks", "angles", "key_angles")
            for array in (getattr(self, name),)
        }
        return dataclasses.replace(self, **stacked, kind=kind)

    @property
    def real(self) -> jax.Array:
        """bool [B, T], False for padding."""
        return self.queries.segment_ids > 0

    def attended(self, attend: Callable[[Where], jax.Array]) -> jax.Array:
        """Returns attend(where) of a layer, with its window known while the program is made."""
        if self.masks is not None:
            return attend(Where(self.queries, self.keys, None, self.masks))
        distinct = list(dict.fromkeys(self.windows))
        ways = [Where(self.queries, self.keys, window) for window in distinct]
        if len(ways) == 1:
            return attend(ways[0])
        number = jnp.asarray([distinct.index(window) for window in self.windows])[self.kind]
        return jax.lax.switch(number, [functools.partial(attend, way) for way in ways])


class Attention(nnx.Module):
    """Grouped-query self-attention (Ainslie et al. 2023, arXiv:2305.13245)."""

    def __init__(self, config: ModelConfig, method: Method, rngs: nnx.Rngs):
        c = config
        q_width, kv_width = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim

        def linear(name, shape, axes, bias, std=None):
            path = f"blocks/attn/{name}"
            return Linear(c, method, path, shape, axes, bias, rngs, std)

        self.q_proj = linear(
            "q_proj", (c.hidden_size, q_width), ("embed", "heads"), c.attention_bias
        )
        self.k_proj = linear(
            "k_proj", (c.hidden_size, kv_width), ("embed", "kv_heads"), c.attention_bias
        )
        self.v_proj = linear(
            "v_proj", (c.hidden_size, kv_width), ("embed", "kv_heads"), c.attention_bias
        )
        self.o_proj = linear(
            "o_proj",
            (q_width, c.hidden_size),
            ("heads", "embed"),
            c.attention_out_bias,
            residual_std(c),
        )
        full = c.qk_norm == "full"
        if c.qk_norm == "none":
            self.q_norm = self.k_norm = None
        else:
            self.q_norm = Norm(c, q_width if full else c.head_dim, "heads" if full else None)
            self.k_norm = Norm(c, kv_width if full else c.head_dim, "kv_heads" if full else None)
        sinks = jnp.zeros((c.num_heads,), jnp.float32)
        self.sinks = param(sinks, "heads") if c.attention_sinks else None
        self.prefix = method.attention(kv_width, rngs)
        self.config = c

    def __call__(self, x, call: Call, cached, key):
        """x [B, T, D] → (y [B, T, D], cached with the new tokens).

        `cached` is (keys, values) [L, B, K, S, H] of all layers and this layer's number, or None.
        """
        c = self.config
        q, k, v = self.q_proj(x, key), self.k_proj(x, key), self.v_proj(x, key)
        if c.qk_norm == "full":
            q, k = self.q_norm(q), self.k_norm(k)
        q = q.reshape(*x.shape[:2], c.num_heads, c.head_dim)
        k = k.reshape(*x.shape[:2], c.num_kv_heads, c.head_dim)
        v = v.reshape(*x.shape[:2], c.num_kv_heads, c.head_dim)
        if c.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        q = rotate(q, call.angles)
        if call.key_angles is None:
            k = rotate(k, call.angles)
        if cached is not None:
            *stored, layer = cached
            stored = [
                write_column(held, layer, call.length, new)
                for held, new in zip(stored, (k, v), strict=True)
            ]
            k, v = (a[layer].swapaxes(1, 2) for a in stored)
            cached = (*stored, layer)
        prefix = None
        if self.prefix is not None:
            shape = (-1, c.num_kv_heads, c.head_dim)
            prefix = (self.prefix.key[...].reshape(shape), self.prefix.value[...].reshape(shape))
        turned = rotate(k, call.key_angles)
        attend = backend(c.attention, cached is not None).attend
        settings = {
            "scale": c.attention_scale,
            "softcap": c.attention_softcap,
            "sinks": None if self.sinks is None else self.sinks[...],
        }
        y = call.attended(lambda where: attend(q, turned, v, where, prefix, **settings))
        return self.o_proj(y.reshape(*x.shape[:2], -1), key), cached


class Mlp(nnx.Module):
    """Feed-forward layer, gated (Shazeer 2020, arXiv:2002.05202) or plain."""

    def __init__(self, config: ModelConfig, method: Method, rngs: nnx.Rngs):
        c = config

        def linear(name, shape, axes, std=None):
            return Linear(c, method, f"blocks/mlp/{name}", shape, axes, c.mlp_bias, rngs, std)

        wide, narrow = (c.hidden_size, c.intermediate_size), (c.intermediate_size, c.hidden_size)
        self.gate_proj = linear("gate_proj", wide, ("embed", "mlp")) if c.gated else None
        self.up_proj = linear("up_proj", wide, ("embed", "mlp"))
        self.down_proj = linear("down_proj", narrow, ("mlp", "embed"), residual_std(c))
        self.activation = c.activation

    def __call__(self, x, key):
        """x [B, T, D] → [B, T, D]."""
        up = self.up_proj(x, key)
        if self.gate_proj is None:
            return self.down_proj(ACTIVATIONS[self.activation](up), key)
        inner = gated_activation(self.activation, self.gate_proj(x, key), up)
        return self.down_proj(inner, key)


class Block(nnx.Module):
    """x + attn(norm(x)), then x + mlp(norm(x)), each seen through the method's slot."""

    def __init__(self, config: ModelConfig, method: Method, rngs: nnx.Rngs):
        c = config
        before, behind = c.norm_placement != "post", c.norm_placement != "pre"
        self.attn_norm = Norm(c, c.hidden_size) if before else None
        self.attn = Attention(c, method, rngs)
        self.attn_post_norm = Norm(c, c.hidden_size) if behind else None
        self.mlp_norm = Norm(c, c.hidden_size) if before else None
        if c.experts is None:
            self.mlp = Mlp(c, method, rngs)
        else:
            self.mlp = ExpertMlp(c, method, rngs, residual_std(c))
        self.mlp_post_norm = Norm(c, c.hidden_size) if behind else None
        self.adapter_attn = method.sublayer("attn", c.hidden_size, rngs)
        self.adapter_mlp = method.sublayer("mlp", c.hidden_size, rngs)
        self.config = c

    def __call__(self, x, call: Call, cached, key):
        """x [B, T, D] → (x, cached, load-balancing loss of each row [B] or None)."""
        h = x if self.attn_norm is None else self.attn_norm(x)
        y, cached = self.attn(h, call, cached, key)
        attended = x + self._written(h, y, self.adapter_attn, self.attn_post_norm)
        x = x if self.config.parallel_residual else attended
        h = x if self.mlp_norm is None else self.mlp_norm(x)
        if self.config.experts is None:
            y, uneven = self.mlp(h, key), None
        else:
            y, routing = self.mlp(h)
            uneven = balance(routing, call.real)
        x = attended + self._written(h, y, self.adapter_mlp, self.mlp_post_norm)
        return x, cached, uneven

    def _written(self, h, y, adapter, norm):
        """What a sub-layer with input h and output y adds to the residual stream."""
        y = y if adapter is None else adapter(h, y)
        y = y if norm is None else norm(y)
        return y if self.config.residual_scale == 1.0 else y * self.config.residual_scale


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


def shared_by_layers(
    config: ModelConfig, queries: Span, keys: Span, length, branches: jax.Array | None = None
) -> Call:
    """Returns where tokens stand, with the masks and angles of each kind of layer.

    Raises:
        ValueError: the model, its attention or a cache cannot tell branches apart.
    """
    c = config
    windows = tuple(kind.window for kind in c.kinds)
    masks = None
    reads_mask = backend(c.attention, length is not None).reads_mask
    if branches is not None and (length is not None or not reads_mask or c.follows_length):
        raise ValueError(
            "completions that share a prompt need attention by a mask, no cache, and angles that "
            f"do not follow a segment's length; attention is {c.attention!r}"
        )
    if reads_mask:
        masks = jnp.stack([visible(queries, keys, window, branches) for window in windows])
    if not c.rotary_width:
        return Call(queries, keys, windows, masks, None, None, length)

    def turned(span: Span):
        lengths = segment_lengths(span, keys) if c.follows_length else None
        return jnp.stack(
            [angles(k.rope, c.head_dim, c.rotary_width, span.positions, lengths) for k in c.kinds]
        )

    late = turned(keys) if c.follows_length else None
    return Call(queries, keys, windows, masks, turned(queries), late, length)


def segment_lengths(queries: Span, keys: Span) -> jax.Array:
    """Returns how long the segment of each query is so far, int32 [B, T]."""
    same = queries.segment_ids[:, :, None] == keys.segment_ids[:, None, :]
    return jnp.max(jnp.where(same, keys.positions[:, None, :] + 1, 0), axis=2)


def residual_std(config: ModelConfig) -> float:
    """Returns the initial spread of the layers that write to the residual stream (GPT-2)."""
    return config.initializer_range / math.sqrt(2 * config.num_layers)


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
