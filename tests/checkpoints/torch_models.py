"""Tiny random models of transformers, and adapters that the real peft made for them."""

import warnings
from pathlib import Path

import numpy as np

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 96,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ROWS = np.random.default_rng(0).integers(3, 97, (2, 16))


def config_of(name: str):
    import transformers

    if name == "gpt2":
        small = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 96}
        return transformers.GPT2Config(vocab_size=97, bos_token_id=1, eos_token_id=2, **small)
    if name == "gpt_neox":
        sizes = {key: value for key, value in SIZES.items() if key != "num_key_value_heads"}
        return transformers.GPTNeoXConfig(**sizes)
    if name == "gemma3":
        own = {"head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8}
        return transformers.Gemma3TextConfig(**SIZES, **own)
    if name == "phi3":
        return transformers.Phi3Config(**SIZES)
    return transformers.LlamaConfig(**SIZES, tie_word_embeddings=name == "tied")


def write_model(directory: Path, name: str) -> Path:
    """Every parameter is random, so that each of them matters."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    net = AutoModelForCausalLM.from_config(config_of(name))
    with torch.no_grad():
        for parameter in net.parameters():
            noise = 0.2 * torch.randn_like(parameter)
            parameter.copy_(noise if parameter.ndim > 1 else 1 + noise)
    net.save_pretrained(directory)
    return directory


def logits(net) -> np.ndarray:
    import torch

    with torch.no_grad():
        out = net(torch.tensor(ROWS)).logits.numpy()
    return out[:, out.shape[1] - ROWS.shape[1] :]


def write_adapter(directory: Path, model: Path, settings, copies: bool = False) -> np.ndarray:
    """Saves a shaken adapter of the real peft; returns its logits, which differ from the base's.

    `copies`: as peft saves by default, with the base's weight of a targeted embedding or head.
    """
    import torch
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        plain = logits(net.eval())
        net = get_peft_model(net, settings).eval()
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter in net.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        net.save_pretrained(directory, save_embedding_layers="auto" if copies else False)
    adapted = logits(net)
    assert np.abs(adapted - plain).max() > 1e-2
    return adapted


def peft_logits(model: Path, adapter: Path) -> np.ndarray:
    """Loads both with the real libraries; a missing, unexpected or unequal tensor is a failure."""
    import peft
    import torch
    from safetensors.numpy import load_file
    from transformers import AutoModelForCausalLM

    net = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        net = peft.PeftModel.from_pretrained(net, adapter).eval()
        held = peft.get_peft_model_state_dict(net, save_embedding_layers=False)
    said = [str(w.message) for w in caught]
    assert not any("missing" in text or "unexpected" in text for text in said), said
    stored = load_file(adapter / "adapter_model.safetensors")
    assert held.keys() == stored.keys()
    assert all(np.array_equal(held[name].detach().numpy(), stored[name]) for name in stored)
    return logits(net)
