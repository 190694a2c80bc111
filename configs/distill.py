r"""Distils a larger model into a smaller one with the same vocabulary.

    jaxtune train --config=configs/distill.py --config.model.path=MODEL_DIR \
        --config.objective.teacher=TEACHER_DIR \
        '--config.data.train[0].source=jsonl:FILE' --workdir=runs/distill

The argument is the divergence: forward, reverse or jsd, as in `configs/distill.py:jsd`. With
`--config.objective.teacher=None --config.objective.teacher_data=DIR` the teacher's most likely
tokens are read from what `jaxtune data teacher` has written.
"""

import ml_collections


def get_config(divergence="forward"):
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.model = {"path": None}  # the user's: the student's Hugging Face directory
    config.peft = {"method": "full"}
    config.objective = {
        "name": "distill",
        "teacher": None,  # the user's: a Hugging Face directory or a run
        "divergence": divergence,
        "teacher_temperature": 1.0,
        "nll_weight": 0.0,
    }
    config.data = {
        "train": [{"format": "chat"}],  # the user's: source
        "seq_len": 1024,
        "packing": True,
    }
    config.batch_size = 16
    config.grad_accum = 4
    config.total_epochs = 1
    config.optim = {
        "name": "adamw",
        "lr": 2e-5,
        "schedule": "cosine",
        "warmup_ratio": 0.05,
        "end_lr_ratio": 0.1,
    }
    config.checkpoint = {"every_steps": 200}
    return config
