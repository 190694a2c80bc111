r"""Learns from completions that are each said to be good or bad, by KTO.

    jaxtune train --config=configs/kto.py --config.model.path=MODEL_DIR \
        '--config.data.train[0].source=jsonl:FILE' --workdir=runs/kto

A record holds prompt, completion and label; pairs serve too (format preference), as one good and
one bad completion each.
"""

import ml_collections


def get_config():
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.model = {"path": None}  # the user's: a Hugging Face directory, or a run tuned by SFT
    config.peft = {"method": "lora", "rank": 16, "alpha": 32.0, "targets": "all-linear"}
    config.objective = {
        "name": "kto",
        "beta": 0.1,
        "desirable_weight": 1.0,
        "undesirable_weight": 1.0,
    }
    config.data = {
        "train": [{"format": "unpaired"}],  # the user's: source
        "seq_len": 1024,
    }
    config.batch_size = 32
    config.grad_accum = 4
    config.total_epochs = 1
    config.optim = {
        "name": "adamw",
        "lr": 5e-5,
        "schedule": "cosine",
        "warmup_ratio": 0.1,
        "end_lr_ratio": 0.1,
    }
    config.checkpoint = {"every_steps": 100}
    return config
