"""The families' table of tests: small configs of transformers, several variants a family.

A row is what `transformers.AutoConfig.for_model` is given. The first row of a family is the one
whose fields are perturbed, one after another, so it has every part switched on that it can have.
Samples are 40, 17 and 6 tokens long: windows are 7 tokens and original contexts 16.
"""

from typing import Any

LENGTHS = (40, 17, 6)
WINDOW, CONTEXT, ORIGINAL = 7, 64, 16

# No token ends a generation, and none is padding.
IDS = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": None}
SMALL = IDS | {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT,
}
LLAMA = SMALL | {"num_key_value_heads": 2, "rms_norm_eps": 1e-5, "tie_word_embeddings": False}

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": ORIGINAL,
}
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 5000.0,
    "factor": 4.0,
    "beta_fast": 8.0,
    "beta_slow": 0.5,
    "original_max_position_embeddings": ORIGINAL,
}
LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 5000.0,
    "short_factor": [1.0, 1.2, 1.5, 2.0],
    "long_factor": [1.5, 2.5, 4.0, 6.0],
    "original_max_position_embeddings": ORIGINAL,
}
EXPERTS = {"num_experts_per_tok": 2, "router_aux_loss_coef": 0.02}
GEMMA = LLAMA | {"head_dim": 16, "tie_word_embeddings": True}
CAPPED = {
    "query_pre_attn_scalar": 24,
    "sliding_window": WINDOW,
    "attn_logit_softcapping": 1.5,
    "final_logit_softcapping": 2.0,
}
GPT2 = IDS | {"vocab_size": 97, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": CONTEXT}
PHI_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 5000.0,
    "short_factor": [1.0, 1.1, 1.4],
    "long_factor": [1.5, 2.5, 4.0],
}


def row(model_type: str, base: dict[str, Any], **fields: Any) -> dict[str, Any]:
    """One row; `fields` win over `base`."""
    return base | {"model_type": model_type} | fields


ROWS: dict[str, dict[str, Any]] = {
    "llama": row(
        "llama", LLAMA, rope_parameters=LLAMA3_ROPE, attention_bias=True, mlp_bias=True, head_dim=16
    ),
    "llama tied": row("llama", LLAMA, tie_word_embeddings=True),
    "mistral": row("mistral", LLAMA, sliding_window=WINDOW),
    "llama linear": row("llama", LLAMA, rope_parameters={"rope_type": "linear", "factor": 2.0}),
    "llama dynamic": row(
        "llama",
        LLAMA,
        max_position_embeddings=ORIGINAL,
        rope_parameters={"rope_type": "dynamic", "rope_theta": 5000.0, "factor": 4.0},
    ),
    "llama yarn": row("llama", LLAMA, rope_parameters=YARN_ROPE),
    "llama longrope": row("llama", LLAMA, rope_parameters=LONG_ROPE),
    "mixtral": row("mixtral", LLAMA, num_local_experts=4, sliding_window=WINDOW, **EXPERTS),
    "qwen2": row(
        "qwen2", LLAMA, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1
    ),
    "qwen2 tied": row("qwen2", LLAMA, tie_word_embeddings=True),
    "qwen3": row(
        "qwen3",
        LLAMA,
        head_dim=16,
        attention_bias=True,
        use_sliding_window=True,
        sliding_window=WINDOW,
        layer_types=["full_attention", "sliding_attention", "full_attention"],
    ),
    "qwen3 plain": row("qwen3", LLAMA),
    "qwen3_moe": row(
        "qwen3_moe",
        LLAMA,
        head_dim=16,
        attention_bias=True,
        num_experts=4,
        moe_intermediate_size=24,
        norm_topk_prob=True,
        use_sliding_window=True,
        sliding_window=WINDOW,
        **EXPERTS,
    ),
    "qwen3_moe plain": row(
        "qwen3_moe", LLAMA, num_experts=5, moe_intermediate_size=24, **EXPERTS, max_window_layers=3
    ),
    "olmo2": row("olmo2", LLAMA, attention_bias=True, rope_parameters=YARN_ROPE),
    "smollm3": row(
        "smollm3",
        LLAMA,
        attention_bias=True,
        mlp_bias=True,
        no_rope_layers=[1, 0, 1],
        use_sliding_window=True,
        sliding_window=WINDOW,
    ),
    "smollm3 tied": row("smollm3", LLAMA, num_hidden_layers=4, tie_word_embeddings=True),
    "granite": row(
        "granite",
        LLAMA,
        attention_bias=True,
        mlp_bias=True,
        embedding_multiplier=3.0,
        residual_multiplier=0.4,
        attention_multiplier=0.2,
        logits_scaling=6.0,
    ),
    "gpt_oss": row(
        "gpt_oss",
        LLAMA,
        head_dim=8,
        num_local_experts=4,
        sliding_window=WINDOW,
        rope_parameters=YARN_ROPE | {"truncate": False},
        **EXPERTS,
    ),
    "gemma": row("gemma", GEMMA, attention_bias=True),
    "gemma untied": row("gemma", GEMMA, tie_word_embeddings=False, rope_parameters=LLAMA3_ROPE),
    "gemma2": row("gemma2", GEMMA, attention_bias=True, **CAPPED),
    "gemma2 all layers slide": row(
        "gemma2", GEMMA, **CAPPED | {"layer_types": ["sliding_attention"] * 3}
    ),
    "gemma3": row(
        "gemma3_text",
        GEMMA,
        attention_bias=True,
        query_pre_attn_scalar=24,
        sliding_window=WINDOW,
        final_logit_softcapping=2.0,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
        rope_parameters={
            "full_attention": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        },
    ),
    "gemma3 yarn and default": row(
        "gemma3_text",
        GEMMA,
        num_hidden_layers=4,
        layer_types=["full_attention", "sliding_attention"] * 2,
        sliding_window=WINDOW,
        rope_parameters={
            "full_attention": YARN_ROPE,
            "sliding_attention": {"rope_type": "linear", "rope_theta": 100.0, "factor": 2.0},
        },
    ),
    "gpt2": row("gpt2", GPT2, n_inner=48),
    "gpt2 untied": row("gpt2", GPT2, tie_word_embeddings=False, scale_attn_weights=False),
    "gpt_neox": row(
        "gpt_neox",
        SMALL,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5},
    ),
    "gpt_neox one after the other": row(
        "gpt_neox",
        SMALL,
        attention_bias=False,
        use_parallel_residual=False,
        tie_word_embeddings=True,
        rope_parameters={
            "rope_type": "linear",
            "rope_theta": 100.0,
            "factor": 2.0,
            "partial_rotary_factor": 0.25,
        },
    ),
    "phi3": row(
        "phi3",
        LLAMA,
        sliding_window=WINDOW,
        original_max_position_embeddings=ORIGINAL,
        rope_parameters=PHI_ROPE | {"partial_rotary_factor": 0.75},
    ),
    "phi3 whole heads": row(
        "phi3",
        LLAMA,
        original_max_position_embeddings=ORIGINAL,
        tie_word_embeddings=True,
        rope_parameters=PHI_ROPE
        | {
            "short_factor": [1.0, 1.1, 1.4, 2.0],
            "long_factor": [1.5, 2.5, 4.0, 6.0],
            "attention_factor": 1.3,
        },
    ),
    "phi3 plain": row("phi3", LLAMA, sliding_window=WINDOW),
}


def first_rows() -> list[str]:
    """The name of each family's first row."""
    seen: dict[str, str] = {}
    for name, fields in ROWS.items():
        seen.setdefault(fields["model_type"], name)
    return list(seen.values())
