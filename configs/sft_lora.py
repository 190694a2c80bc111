r"""Tunes a low-rank update of every linear layer (LoRA and its variants).

    jaxtune train --config=configs/sft_lora.py --config.model.path=MODEL_DIR \
        '--config.data.train[0].source=jsonl:FILE' --workdir=runs/sft_lora

The argument is the variant: lora, rslora, dora or pissa, as in `configs/sft_lora.py:dora`.
`--config.peft.ratio=16` gives LoRA+.
"""

import ml_collections


def get_config(variant="lora"):
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.model = {"path": None}  # the user's: a Hugging Face directory
    config.peft = {
        "method": "lora",
        "rank": 8,
        "alpha": 16.0,
        "dropout": 0.0,
        "targets": "all-linear",
        "variant": variant,
    }
    config.objective = {"name": "sft"}
    config.data = {
        "train": [{"format": "chat"}],  # the user's: source
        "seq_len": 512,
        "packing": True,
    }
    config.batch_size = 16
    config.grad_accum = 1
    config.total_epochs = 2
    config.optim = {
        "name": "adamw",
        "lr": 2e-4,
        "schedule": "cosine",
        "warmup_ratio": 0.05,
        "end_lr_ratio": 0.1,
    }
    config.checkpoint = {"every_steps": 100}
    return config
