r"""Learns from pairs by SimPO: log-probabilities a token with a target margin, no reference.

    jaxtune train --config=configs/simpo.py --config.model.path=MODEL_DIR \
        '--config.data.train[0].source=jsonl:FILE' --workdir=runs/simpo

`--config.objective.nll_weight=0.1` keeps the chosen sides likely.
"""

import ml_collections


def get_config():
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.model = {"path": None}  # the user's: a Hugging Face directory, or a run tuned by SFT
    config.peft = {"method": "lora", "rank": 16, "alpha": 32.0, "targets": "all-linear"}
    config.objective = {"name": "simpo", "beta": 2.0, "gamma": 1.0}
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
        "lr": 2e-5,
        "schedule": "cosine",
        "warmup_ratio": 0.1,
        "end_lr_ratio": 0.1,
    }
    config.checkpoint = {"every_steps": 100}
    return config
