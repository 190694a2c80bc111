r"""Trains a small language model from random weights on plain text.

    jaxtune train --config=configs/pretrain_tiny.py --config.model.tokenizer=TOKENIZER_DIR \
        '--config.data.train[0].source=jsonl:FILE' --workdir=runs/pretrain_tiny

FILE holds a line {"text": ...} a document; TOKENIZER_DIR holds tokenizer.json. The argument is the
preset, as in `configs/pretrain_tiny.py:small-20m`.
"""

import ml_collections


def get_config(preset="tiny-1m"):
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.model = {"preset": preset, "tokenizer": None, "dtype": "float32"}
    config.peft = {"method": "full"}
    config.objective = {"name": "pretrain"}
    config.data = {
        "train": [{"format": "text"}],  # the user's: source
        "seq_len": 128,
        "packing": True,
    }
    config.batch_size = 32
    config.total_steps = 400
    config.optim = {
        "name": "adamw",
        "lr": 3e-3,
        "b2": 0.99,
        "weight_decay": 0.1,
        "schedule": "wsd",
        "warmup_steps": 20,
        "decay_ratio": 0.2,
    }
    config.checkpoint = {"every_steps": 100}
    return config
