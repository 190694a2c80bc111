r"""Trains a reward model on pairs: a score head, and a low-rank update of every linear layer.

    jaxtune train --config=configs/reward.py --config.model.path=MODEL_DIR \
        '--config.data.train[0].source=jsonl:FILE' --workdir=runs/reward

FILE has {"prompt", "chosen", "rejected"} on each line; `docs/reward_models.md` says what else is
read (ranked lists, judged steps) and how the model is used.
"""

import ml_collections


def get_config():
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.model = {"path": None}  # the user's: a Hugging Face directory
    config.peft = {"method": "lora", "rank": 8, "alpha": 16.0, "targets": "all-linear"}
    config.objective = {"name": "reward", "centering": 0.01}
    config.data = {
        "train": [{"format": "preference"}],  # the user's: source
        "seq_len": 1024,  # of a row, which holds both sides of a pair with their prompt
    }
    config.batch_size = 16
    config.grad_accum = 1
    config.total_epochs = 1
    config.optim = {
        "name": "adamw",
        "lr": 1e-4,
        "schedule": "cosine",
        "warmup_ratio": 0.05,
        "end_lr_ratio": 0.1,
    }
    config.checkpoint = {"every_steps": 100}
    return config
