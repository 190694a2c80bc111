r"""Reinforcement learning with a value function on the policy's own trunk (PPO).

    jaxtune train --config=configs/ppo.py --config.model.path=MODEL_DIR \
        '--config.data.train[0].source=jsonl:FILE' \
        '--config.objective.rewards[0].function=contains' \
        '--config.objective.rewards[0].arguments={"word": "big"}' --workdir=runs/ppo

FILE has a `prompt` a line, and the fields that the rewards read.
"""

import ml_collections


def get_config():
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.model = {"path": None}  # the user's: a Hugging Face directory
    config.peft = {"method": "lora", "rank": 8, "alpha": 16.0}
    config.objective = {
        "name": "ppo",
        "rewards": [{"function": "math"}],
        "prompts": 64,
        "samples": 1,
        "epochs": 4,
        "max_new_tokens": 256,
        "temperature": 1.0,
    }
    config.data = {
        "train": [{"format": "prompt"}],  # the user's: source
        "seq_len": 768,
    }
    config.batch_size = 32
    config.grad_accum = 4
    config.total_steps = 800
    config.optim = {"name": "adamw", "lr": 1e-4, "warmup_steps": 40, "clip_norm": 1.0}
    config.checkpoint = {"every_steps": 80}
    config.log = {"every_steps": 1}
    return config
