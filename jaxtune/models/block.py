"""A layer of the decoder: attention, feed-forward, norms and residuals."""

from __future__ import annotations

import math

import jax.numpy as jnp
from flax import nnx

from jaxtune.models.attention_backends import backend
from jaxtune.models.cache import write_column
from jaxtune.models.call import Call
from jaxtune.models.config import ModelConfig
from jaxtune.models.experts import ExpertMlp
from jaxtune.models.layers import ACTIVATIONS, Linear, Norm, gated_activation
from jaxtune.models.rope import rotate
from jaxtune.models.routing import balance
from jaxtune.peft.method import Method, param


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


def residual_std(config: ModelConfig) -> float:
    """Returns the initial spread of the layers that write to the residual stream (GPT-2)."""
    return config.initializer_range / math.sqrt(2 * config.num_layers)
