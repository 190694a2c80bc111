r"""Compares learning rate and rank of LoRA, and rsLoRA at the larger rank.

    jaxtune sweep --config=configs/lora_sweep.py --config.model.path=MODEL_DIR \
        '--config.data.train[0].source=jsonl:TRAIN' '--config.data.eval[0].source=jsonl:HELD_OUT' \
        --workdir=runs/lora_sweep

Seven trials, ranked by eval/loss; `--dry_run` lists them.
"""

import ml_collections


def get_config():
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.model = {"path": None}  # the user's: a Hugging Face directory
    config.peft = {"method": "lora", "rank": 8, "alpha": 16.0}
    config.objective = {"name": "sft"}
    config.data = {
        "train": [{"format": "chat"}],  # the user's: source
        "eval": [{"format": "chat"}],  # the user's: source
        "seq_len": 512,
        "packing": True,
    }
    config.batch_size = 16
    config.total_epochs = 1
    config.optim = {"name": "adamw", "lr": 2e-4, "schedule": "cosine", "warmup_ratio": 0.05}
    return config


def get_hyper(h):
    return h.chain(
        h.product(h.sweep("optim.lr", [1e-4, 3e-4, 1e-3]), h.sweep("peft.rank", [4, 16])),
        [{"peft.rank": 16, "peft.variant": "rslora", "optim.lr": 3e-4}],
    )
