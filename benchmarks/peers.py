"""What the speed tables share: a model on disk, and how Tunix reads it."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

RANK, ALPHA, RATE = 8, 16, 1e-3


def write_model(directory: Path, options: argparse.Namespace) -> Path:
    """Writes a Llama of random weights with a tokenizer of whole words; returns its directory."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    names = ["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(options.vocab - 3))]
    words = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, "<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(directory)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=options.vocab,
        hidden_size=options.width,
        intermediate_size=11 * options.width // 4,
        num_hidden_layers=options.layers,
        num_attention_heads=options.width // 32,
        num_key_value_heads=options.width // 64,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        rms_norm_eps=1e-5,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


def tunix_policy(model: Path) -> tuple[Any, Any, Any]:
    """Returns (mesh, the model as Tunix's own reader loads it, the same with a Qwix LoRA)."""
    import jax
    import jax.numpy as jnp
    import qwix
    from tunix.models.llama3 import model as llama
    from tunix.models.llama3 import params as reader

    config = json.loads((model / "config.json").read_text())
    shape = llama.ModelConfig(
        num_layers=config["num_hidden_layers"],
        vocab_size=config["vocab_size"],
        embed_dim=config["hidden_size"],
        hidden_dim=config["intermediate_size"],
        num_heads=config["num_attention_heads"],
        head_dim=config["head_dim"],
        num_kv_heads=config["num_key_value_heads"],
        rope_theta=config["rope_parameters"]["rope_theta"],
        norm_eps=config["rms_norm_eps"],
        weight_tying=True,
    )
    mesh = jax.make_mesh((1, 1), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    with jax.set_mesh(mesh):
        base = reader.create_model_from_safe_tensors(str(model), shape, mesh, jnp.float32)
        names = ".*q_proj|.*k_proj|.*v_proj|.*o_proj|.*gate_proj|.*up_proj|.*down_proj"
        provider = qwix.LoraProvider(module_path=names, rank=RANK, alpha=ALPHA)
        policy = qwix.apply_lora_to_model(base, provider, **base.get_model_input())
    return mesh, base, policy
