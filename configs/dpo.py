r"""Learns from pairs of completions by DPO, against the model as it is at the start.

    jaxtune train --config=configs/dpo.py --config.model.path=MODEL_DIR \
        '--config.data.train[0].source=jsonl:FILE' --workdir=runs/dpo

A record holds prompt, chosen and rejected; see `docs/preferences.md`. The argument is the loss:
sigmoid, sigmoid_norm, robust, hinge or ipo, as in `configs/dpo.py:ipo`.
"""

import ml_collections


def get_config(loss_type="sigmoid"):
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.model = {"path": None}  # the user's: a Hugging Face directory, or a run tuned by SFT
    config.peft = {"method": "lora", "rank": 16, "alpha": 32.0, "targets": "all-linear"}
    config.objective = {"name": "dpo", "beta": 0.1, "loss_type": loss_type}
    config.data = {
        "train": [{"format": "preference"}],  # the user's: source
        "seq_len": 1024,
        "packing": True,  # both sides share their prompt
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
