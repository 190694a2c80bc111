"""The PyTorch side: transformers and PEFT on the files of tiny.py. Imports torch.

python -m tests.goldens.reference --write     # rewrites adapter_configs.json with PEFT's own
"""

import argparse
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import (
    IA3Config,
    LoraConfig,
    PeftConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.utils import logging

from tests.goldens import tiny

LIBRARIES = ("torch", "transformers", "peft", "numpy", "safetensors")


def versions() -> dict[str, str]:
    """The versions of the libraries that the goldens come from."""
    return {name: version(name) for name in LIBRARIES}


def quiet() -> None:
    """One thread, for sums in one order, and no progress bars."""
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    logging.set_verbosity_error()


def load_model(model: Path, adapter: Path | None = None, dtype: torch.dtype = torch.float32):
    """The checkpoint in `model` on the CPU, with the PEFT `adapter` attached and trainable.

    PEFT's own loader refuses to train a loaded prompt or prefix, so the adapter is built from its
    config and its tensors are set, then read back: a tensor that found no place is an error.
    """
    # Eager attention takes its softmax in float32 whatever the dtype: no float64 reference.
    attention = "eager" if dtype == torch.float32 else "sdpa"
    net = LlamaForCausalLM.from_pretrained(model, dtype=dtype, attn_implementation=attention)
    if adapter is None:
        return net.train()
    config = PeftConfig.from_pretrained(adapter)
    config.inference_mode = False
    net = get_peft_model(net, config)
    tensors = load_file(Path(adapter) / "adapter_model.safetensors")
    set_peft_model_state_dict(net, tensors)
    held = get_peft_model_state_dict(net)
    if set(held) != set(tensors) or any(not held[k].equal(tensors[k]) for k in tensors):
        raise ValueError(f"{adapter}: PEFT did not take these tensors: {sorted(tensors)}")
    return net.to(dtype).train()


def trainable(net) -> list[torch.nn.Parameter]:
    """The parameters that PEFT trains (all of them without an adapter)."""
    return [parameter for parameter in net.parameters() if parameter.requires_grad]


def logits_of(net, ids: np.ndarray, mask: np.ndarray) -> torch.Tensor:
    """[B, T, V] logits of right-padded ids and mask [B, T], virtual positions cut away."""
    out = net(
        input_ids=torch.as_tensor(ids, dtype=torch.long),
        attention_mask=torch.as_tensor(mask, dtype=torch.long),
        use_cache=False,
    ).logits
    return out[:, out.shape[1] - ids.shape[1] :]


def left_padded_logits(net, rows: list[list[int]]) -> list[torch.Tensor]:
    """Logits [len, V] of each row, computed with the padding on the left.

    A learned prompt has to stand next to the real tokens; PEFT's forward would leave the padding
    between them, so its embeddings are put there by hand.
    """
    ids, mask = (torch.as_tensor(x, dtype=torch.long) for x in tiny.pad(rows, "left"))
    config = getattr(net, "active_peft_config", None)
    if config is None or config.peft_type != "PROMPT_TUNING":
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        out = net(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False)
    else:
        prompt = net.get_prompt(1)[0]
        real = torch.ones(len(prompt), dtype=torch.long)
        padding = [ids.shape[1] - len(row) for row in rows]
        embedded = [
            torch.cat([e[:n], prompt, e[n:]])
            for e, n in zip(net.word_embeddings(ids), padding, strict=True)
        ]
        mask = torch.stack(
            [torch.cat([m[:n], real, m[n:]]) for m, n in zip(mask, padding, strict=True)]
        )
        out = net.get_base_model()(
            inputs_embeds=torch.stack(embedded),
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0),
            use_cache=False,
        )
    return [out.logits[i, -len(row) :] for i, row in enumerate(rows)]


@contextmanager
def exact_norms() -> Iterator[None]:
    """RMSNorm in the dtype of its input: transformers computes it in float32 even for float64."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x * (x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()

    before, LlamaRMSNorm.forward = LlamaRMSNorm.forward, forward
    try:
        yield
    finally:
        LlamaRMSNorm.forward = before


def peft_configs() -> dict[str, Any]:
    """Kind → PEFT's own config object for the adapters of tiny.py."""
    lora = {"r": tiny.RANK, "lora_alpha": tiny.ALPHA, "lora_dropout": 0.0, "task_type": "CAUSAL_LM"}
    virtual = {"num_virtual_tokens": tiny.VIRTUAL, "task_type": "CAUSAL_LM"}
    every = list(tiny.LINEAR)
    return {
        "lora": LoraConfig(target_modules=every, **lora),
        "lora_qv": LoraConfig(target_modules=["q_proj", "v_proj"], **lora),
        "rslora": LoraConfig(target_modules=every, use_rslora=True, **lora),
        "dora": LoraConfig(target_modules=every, use_dora=True, **lora),
        "prompt": PromptTuningConfig(**virtual),
        "prefix": PrefixTuningConfig(**virtual),
        "ia3": IA3Config(task_type="CAUSAL_LM"),
    }


def save_adapter(directory: Path, kind: str, model: Path) -> dict[str, Any]:
    """Lets PEFT save a fresh adapter of `kind`: its adapter_config.json, sets sorted."""
    net = get_peft_model(LlamaForCausalLM.from_pretrained(model), peft_configs()[kind])
    net.save_pretrained(directory)
    config = json.loads((Path(directory) / "adapter_config.json").read_text())
    # PEFT holds these as sets, whose order changes from run to run.
    for key in ("target_modules", "feedforward_modules"):
        if config.get(key):
            config[key] = sorted(config[key])
    return config | {"base_model_name_or_path": ""}


def main() -> int:
    """Compares adapter_configs.json with what PEFT writes, or rewrites it; 1 if they differ."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help=f"rewrite {tiny.CONFIGS.name}")
    write = parser.parse_args().write
    quiet()
    with tempfile.TemporaryDirectory() as scratch:
        model = tiny.write_llama(Path(scratch) / "model")
        configs = {kind: save_adapter(Path(scratch) / kind, kind, model) for kind in tiny.ADAPTERS}
    if write:
        tiny.CONFIGS.write_text(json.dumps(configs, indent=1) + "\n")
    return int(configs != json.loads(tiny.CONFIGS.read_text()))


if __name__ == "__main__":
    raise SystemExit(main())
