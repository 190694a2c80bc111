"""What TRL's PPOTrainer computes from given log-probabilities, values and rewards.

python -m tests.goldens.ppo_losses --write     # rewrites ppo_losses.json
python -m tests.goldens.ppo_losses             # compares with it

TRL 1 has no PPO. 0.11.4 is the last version whose trainer has the loss, the rewards and the
advantages as methods of their own, which run here on stand-ins; it wants older libraries:

    pip install --target OLD --no-deps trl==0.11.4 transformers==4.46.3 tokenizers==0.20.3 \\
        huggingface_hub==0.26.5 accelerate==1.0.1 datasets==3.1.0 peft==0.13.2 fsspec==2024.9.0 \\
        dill==0.3.8 multiprocess==0.70.16 xxhash tyro docstring_parser shtab typeguard
    PYTHONPATH=OLD:. python -m tests.goldens.ppo_losses --write

with torch and numpy as for the other goldens.
"""

import argparse
import json
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

FILE = Path(__file__).with_name("ppo_losses.json")
LIBRARIES = ("trl", "torch", "numpy")
ROWS, TOKENS, VOCAB = 4, 7, 5
SETTINGS = {
    "cliprange": 0.2,
    "cliprange_value": 0.15,
    "vf_coef": 0.3,
    "ratio_threshold": 10.0,
    "gamma": 0.97,
    "lam": 0.9,
    "kl_coef": 0.12,
}
CONTROLLER = {"start": 0.1, "target": 6.0, "horizon": 1000, "steps": 64, "kls": [9.0, 6.5, 2.0]}


def inputs() -> dict[str, Any]:
    """Returns the arrays, lists of floats that float32 holds exactly; rows are ragged."""
    rng = np.random.RandomState(0)

    def uniform(low: float, high: float, *shape: int) -> np.ndarray:
        return (low + (high - low) * rng.random_sample(shape)).astype(np.float32)

    shape = (ROWS, TOKENS)
    policy, values = uniform(-2.5, -0.1, *shape), uniform(-1, 1, *shape)
    found = {
        "mask": (np.arange(TOKENS) < np.array([7, 3, 1, 5])[:, None]).astype(np.float32),
        "policy": policy,
        "old": policy + uniform(-0.5, 0.5, *shape),
        "reference": policy + uniform(-0.8, 0.8, *shape),
        "values": values + uniform(-0.4, 0.4, *shape),
        "old_values": values,
        "scores": uniform(-1, 1, ROWS),
        "logits": uniform(-2, 2, *shape, VOCAB),
    }
    return {name: array.tolist() for name, array in found.items()}


def outcomes() -> dict[str, Any]:
    """Returns what TRL makes of `inputs()`."""
    import torch
    from trl.trainer.ppo_trainer import PPOTrainer
    from trl.trainer.utils import AdaptiveKLController

    torch.set_num_threads(1)
    given = {name: torch.tensor(x, dtype=torch.float64) for name, x in inputs().items()}
    mask, found = given["mask"], {}
    config = SimpleNamespace(**SETTINGS, kl_penalty="kl", whiten_rewards=False)
    me = SimpleNamespace(config=config, kl_ctl=SimpleNamespace(value=SETTINGS["kl_coef"]))
    me._kl_penalty = PPOTrainer._kl_penalty.__get__(me)

    rewards, _, kl = PPOTrainer.compute_rewards(
        me, given["scores"], given["old"], given["reference"], mask
    )
    found["rewards"], found["kl"] = (rewards * mask).tolist(), (kl * mask).tolist()
    kept = PPOTrainer.compute_advantages(me, given["old_values"], rewards, mask)[1:]
    found["advantages"], found["returns"] = ((x * mask).tolist() for x in kept)
    # On whole rows: TRL's whitening leaves numbers on the padding, which its advantages then count.
    config.whiten_rewards = True
    _, whole, _ = PPOTrainer.compute_advantages(
        me, given["old_values"], given["old"], torch.ones_like(mask)
    )
    found["advantages_of_whitened"] = whole.tolist()
    leaves = [given[name].clone().requires_grad_() for name in ("policy", "values")]
    policy, value, stats = PPOTrainer.loss(
        me, given["old"], given["old_values"], given["logits"], leaves[1], leaves[0], mask, *kept
    )
    (policy + value).backward()
    found["policy_loss"], found["value_loss"] = policy.item(), value.item()
    found["policy_grad"], found["values_grad"] = (leaf.grad.tolist() for leaf in leaves)
    wanted = ("policy/entropy", "policy/clipfrac", "val/clipfrac", "val/vpred", "val/error")
    found["metrics"] = {name: float(stats[name]) for name in wanted}

    controller = AdaptiveKLController(
        CONTROLLER["start"], CONTROLLER["target"], CONTROLLER["horizon"]
    )
    found["coefficients"] = []
    for measured in CONTROLLER["kls"]:
        controller.update(measured, CONTROLLER["steps"])
        found["coefficients"].append(float(controller.value))
    return found


def main() -> int:
    """Writes the goldens, or compares them with a new run; 1 if a number is off by over 1e-9."""
    from tests.goldens.preference_losses import distance

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help=f"rewrite {FILE.name}")
    found = outcomes()
    if parser.parse_args().write:
        report = {"versions": {name: version(name) for name in LIBRARIES}}
        report |= {"inputs": inputs(), "outcomes": found}
        FILE.write_text(json.dumps(report, separators=(",", ":")) + "\n")
        return 0
    golden = json.loads(FILE.read_text())["outcomes"]
    for name in golden:
        print(f"{name:24} {distance(golden[name], found[name]):.1e}")
    return int(distance(golden, found) > 1e-9)


if __name__ == "__main__":
    raise SystemExit(main())
