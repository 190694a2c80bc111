r"""Reinforcement learning from scored samples, each compared with others of its prompt (GRPO).

    jaxtune train --config=configs/grpo.py --config.model.path=MODEL_DIR \
        '--config.data.train[0].source=jsonl:FILE' \
        '--config.objective.rewards[0].function=contains' \
        '--config.objective.rewards[0].arguments={"word": "big"}' --workdir=runs/grpo

The argument is the variant: grpo, dr_grpo, dapo, gspo, rloo or reinforce++, as in
`configs/grpo.py:dapo`. FILE has a `prompt` a line, and the fields that the rewards read.
"""

import ml_collections


def get_config(variant="grpo"):
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.model = {"path": None}  # the user's: a Hugging Face directory
    config.peft = {"method": "lora", "rank": 8, "alpha": 16.0}
    config.objective = {
        "name": "grpo",
        "variant": variant,
        "rewards": [{"function": "math"}],
        "prompts": 8,
        "samples": 8,
        "max_new_tokens": 256,
        "temperature": 1.0,
    }
    config.data = {
        "train": [{"format": "prompt"}],  # the user's: source
        "seq_len": 768,
    }
    config.batch_size = 64
    config.grad_accum = 8
    config.total_steps = 200
    config.optim = {"name": "adamw", "lr": 1e-4, "warmup_steps": 10, "clip_norm": 1.0}
    config.checkpoint = {"every_steps": 50}
    config.log = {"every_steps": 1}
    return config
