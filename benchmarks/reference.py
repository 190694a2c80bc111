"""The same model and step written by hand: what the product's layers are measured against.

A Llama with LoRA in a few plain functions over the product's parameter tree, and with PyTorch,
transformers and PEFT where they can be imported. Nothing here is used outside `benchmarks/`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def loss(params: dict, config: Any, scale: float, ids: jax.Array) -> jax.Array:
    """Returns the mean next-token loss of ids int32 [B, T]: no padding, one segment a row."""
    tokens, size = ids.shape[1], config.head_dim
    frequencies = config.kinds[0].rope.theta ** (-np.arange(0, size, 2) / size)
    angles = jnp.arange(tokens)[:, None, None] * jnp.asarray(frequencies, jnp.float32)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    causal = jnp.tril(jnp.ones((tokens, tokens), bool))

    def linear(x, p):
        y = x @ p["kernel"]
        return y + (x @ p["lora"]["a"]) @ p["lora"]["b"] * scale if "lora" in p else y

    def norm(x, p):
        return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + config.norm_eps) * p["scale"]

    def rotate(x):
        a, b = jnp.split(x, 2, -1)
        return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

    def heads(x, count):
        return x.reshape(*x.shape[:2], count, size)

    def block(x, p):
        h, attn, mlp = norm(x, p["attn_norm"]), p["attn"], p["mlp"]
        q = rotate(heads(linear(h, attn["q_proj"]), config.num_heads))
        k = rotate(heads(linear(h, attn["k_proj"]), config.num_kv_heads))
        v = heads(linear(h, attn["v_proj"]), config.num_kv_heads)
        q = q.reshape(*q.shape[:2], config.num_kv_heads, -1, size)
        scores = jnp.einsum("btkgh,bskh->bkgts", q, k) / size**0.5
        weights = jax.nn.softmax(jnp.where(causal, scores, -jnp.inf), -1)
        y = jnp.einsum("bkgts,bskh->btkgh", weights, v).reshape(*x.shape[:2], -1)
        x = x + linear(y, attn["o_proj"])
        h = norm(x, p["mlp_norm"])
        gated = jax.nn.silu(linear(h, mlp["gate_proj"])) * linear(h, mlp["up_proj"])
        return x + linear(gated, mlp["down_proj"]), None

    table = params["embed"]["embedding"]
    x, _ = jax.lax.scan(block, table[ids], params["blocks"])
    logits = norm(x, params["final_norm"])[:, :-1] @ table.T
    return optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:]).mean()


def make_step(config: Any, scale: float, rate: float, combine: Callable) -> tuple[Any, Any]:
    """Returns (tx, jitted step): (trainable, opt_state, frozen, ids) → (trainable, state, loss)."""
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, weight_decay=0.0))

    def step(trainable, state, frozen, ids):
        value, grads = jax.value_and_grad(lambda t: loss(combine(t, frozen), config, scale, ids))(
            trainable
        )
        updates, state = tx.update(grads, state, trainable)
        return optax.apply_updates(trainable, updates), state, value

    return tx, jax.jit(step, donate_argnums=(0, 1))


def torch_step(config: Any, method: str, rank: int, alpha: float, rate: float, ids: np.ndarray):
    """Returns a function that takes one eager step of transformers (+ PEFT), random weights.

    Raises:
        ImportError: torch, transformers or peft is missing.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    net = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            max_position_embeddings=config.max_position_embeddings,
            tie_word_embeddings=config.tie_embeddings,
        )
    )
    if method == "lora":
        from peft import LoraConfig, get_peft_model

        net = get_peft_model(net, LoraConfig(r=rank, lora_alpha=alpha, target_modules=LINEARS))
    trained = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    rows = torch.tensor(ids, dtype=torch.long)

    def step() -> float:
        optimizer.zero_grad()
        value = net(input_ids=rows, labels=rows).loss
        value.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        return value.item()

    return step
