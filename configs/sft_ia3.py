r"""Tunes one scale for each channel of keys, values and MLP (IA3).

    jaxtune train --config=configs/sft_ia3.py --config.model.path=MODEL_DIR \
        '--config.data.train[0].source=jsonl:FILE' --workdir=runs/sft_ia3

The scales merge into the weights when the model is exported.
"""

import ml_collections


def get_config():
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.model = {"path": None}  # the user's: a Hugging Face directory
    config.peft = {"method": "ia3", "targets": ["k_proj", "v_proj", "down_proj"]}
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
        "lr": 5e-3,
        "schedule": "cosine",
        "warmup_ratio": 0.05,
        "end_lr_ratio": 0.1,
    }
    config.checkpoint = {"every_steps": 100}
    return config
