"""What the speed tables share: a model on disk, how Tunix reads it, how TRL trains it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.reference import LINEARS

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


def trl_settings(directory: Path) -> dict[str, Any]:
    """Returns what the configs of TRL's trainers have in common: float32 on CPU, AdamW."""
    return {
        "output_dir": str(directory),
        "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch",
        "bf16": False,
        "gradient_checkpointing": False,
        "use_cpu": True,
        "report_to": "none",
    }


def trl_model(model: Path) -> dict[str, Any]:
    """Returns the arguments of a TRL trainer that say what is trained: the model, a PEFT LoRA."""
    import torch
    from peft import LoraConfig
    from transformers import LlamaForCausalLM

    return {
        "model": LlamaForCausalLM.from_pretrained(model, dtype=torch.float32),
        "peft_config": LoraConfig(
            r=RANK, lora_alpha=ALPHA, target_modules=list(LINEARS), task_type="CAUSAL_LM"
        ),
    }


def trl_update(trainer: Any) -> Callable[[], float]:
    """Returns a step of a TRL trainer on its first batch: its own `training_step`, then AdamW.

    The step returns the loss.
    """
    import torch

    trainer.create_optimizer_and_scheduler(1000)
    trainer.current_gradient_accumulation_steps = 1
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    batch = next(iter(trainer.get_train_dataloader()))

    def update() -> float:
        trainer.model.train()
        loss = trainer.training_step(trainer.model, batch, None)
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
        return loss.item()

    return update
