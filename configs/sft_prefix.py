r"""Tunes keys and values of 20 virtual tokens in every layer (prefix tuning).

    jaxtune train --config=configs/sft_prefix.py --config.model.path=MODEL_DIR \
        '--config.data.train[0].source=jsonl:FILE' --workdir=runs/sft_prefix

The virtual tokens stand before every example; the model's own weights stay as they are.
"""

import ml_collections


def get_config():
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.model = {"path": None}  # the user's: a Hugging Face directory
    config.peft = {"method": "prefix", "num_tokens": 20}
    config.objective = {"name": "sft"}
    config.data = {
        "train": [{"format": "chat"}],  # the user's: source
        "seq_len": 512,
        "packing": False,
    }
    config.batch_size = 16
    config.grad_accum = 1
    config.total_epochs = 2
    config.optim = {
        "name": "adamw",
        "lr": 1e-2,
        "schedule": "cosine",
        "warmup_ratio": 0.05,
        "end_lr_ratio": 0.1,
    }
    config.checkpoint = {"every_steps": 100}
    return config
