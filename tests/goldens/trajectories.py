"""Ten training steps with PyTorch + PEFT: the losses and gradient norms that jaxtune must give.

python -m tests.goldens.trajectories --write     # rewrites trajectories.json
python -m tests.goldens.trajectories             # compares with it, shows how stable it is
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.goldens import reference, tiny

FILE = Path(__file__).with_name("trajectories.json")
METHODS = ("full", *tiny.ADAPTERS)

# Decoupled weight decay (optax.adamw and torch.optim.AdamW agree) on every trainable leaf, norm
# scales, biases, magnitudes and prompts included; constant learning rate; no dropout.
RECIPE = {
    "steps": tiny.STEPS,
    "batch_size": tiny.BATCH,
    "max_length": tiny.SEQ,
    "b1": 0.9,
    "b2": 0.999,
    "eps": 1e-8,
    "weight_decay": 0.01,
    "weight_decay_on": "every trainable leaf",
    "clip_norm": 1.0,
    "grad_norm": "before clipping, over the trainable leaves",
    "loss": "sum of the masked targets' NLL / number of masked targets, over the batch",
    "num_virtual_tokens": tiny.VIRTUAL,
    # Large enough that a learning rate off by 1 %, or decay left out, shows at 1e-4; small enough
    # that rounding stays below 1e-6.
    "lr": {method: 1e-2 for method in METHODS}
    | {"full": 3e-3, "rslora": 3e-3, "prompt": 0.1, "prefix": 0.1, "ia3": 0.05},
}


def loss_of(net, examples: list[dict[str, list[int]]]) -> torch.Tensor:
    """Sum of the negative log-likelihoods of the masked targets over their number."""
    ids, mask = tiny.pad([example["input_ids"] for example in examples], "right")
    weights, _ = tiny.pad([example["loss_mask"] for example in examples], "right")
    logprobs = torch.log_softmax(reference.logits_of(net, ids, mask), -1)
    # Token t is predicted from position t - 1; the first token of an example is no target.
    targets = torch.as_tensor(ids[:, 1:], dtype=torch.long)
    nll = -logprobs[:, :-1].gather(-1, targets[..., None])[..., 0]
    weights = torch.as_tensor(weights[:, 1:], dtype=nll.dtype)
    return (nll * weights).sum() / weights.sum()


def run(
    method: str, directory: Path, *, dtype: torch.dtype = torch.float32, noise: float = 0.0
) -> dict[str, Any]:
    """Trains `method` ("full" or a kind of tiny.ADAPTERS) on files written to `directory`.

    Returns loss [steps], grad_norm [steps] (before clipping) and trainable, the number of trained
    values. `noise` scales every weight by 1 + noise * u, u in [-1, 1]: how far that moves the
    trajectory says how far a correct implementation may be off.
    """
    net = reference.load_model(*tiny.write_world(directory, method), dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in net.parameters():
            u = 2 * torch.rand(parameter.shape, generator=generator, dtype=torch.float64) - 1
            parameter.mul_((1 + noise * u).to(parameter.dtype) if noise else 1)
    parameters = reference.trainable(net)
    optimizer = torch.optim.AdamW(
        parameters,
        lr=RECIPE["lr"][method],
        betas=(RECIPE["b1"], RECIPE["b2"]),
        eps=RECIPE["eps"],
        weight_decay=RECIPE["weight_decay"],
    )
    losses, norms = [], []
    for examples in tiny.batches():
        optimizer.zero_grad()
        loss = loss_of(net, examples)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, RECIPE["clip_norm"])
        optimizer.step()
        losses.append(loss.item())
        norms.append(norm.item())
    return {"loss": losses, "grad_norm": norms, "trainable": sum(p.numel() for p in parameters)}


def distance(a: dict[str, Any], b: dict[str, Any]) -> float:
    """The largest difference of two runs, relative where the value is above 1."""
    x, y = (np.array([run["loss"], run["grad_norm"]]) for run in (a, b))
    return float(np.max(np.abs(x - y) / np.maximum(1.0, np.abs(y))))


def main() -> int:
    """Writes the goldens, or compares them with a new run; 1 if a method is off by over 1e-5."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help=f"rewrite {FILE.name}")
    write = parser.parse_args().write
    reference.quiet()
    golden = {} if write else json.loads(FILE.read_text())["runs"]
    runs, worst = {}, 0.0
    with tempfile.TemporaryDirectory() as scratch:
        for method in METHODS:
            directory = Path(scratch)
            result = run(method, directory)
            repeated = run(method, directory) == result
            with reference.exact_norms():
                double = distance(result, run(method, directory, dtype=torch.float64))
            noisy = distance(result, run(method, directory, noise=1e-7))
            inputs = tiny.world_fingerprint(directory, method)
            runs[method] = {"inputs": inputs, "float64_error": double} | result
            change = 0.0 if write else distance(result, golden[method])
            worst = max(worst, change)
            print(
                f"{method:8} loss {result['loss'][0]:.4f} -> {result['loss'][-1]:.4f}"
                f"  norm {max(result['grad_norm']):.3f} .. {min(result['grad_norm']):.3f}"
                f"  repeats {repeated}  float64 {double:.1e}  noise {noisy:.1e}"
                f"  golden {change:.1e}"
            )
    if write:
        report = {"versions": reference.versions(), "recipe": RECIPE, "runs": runs}
        FILE.write_text(json.dumps(report, indent=1) + "\n")
    return int(worst > 1e-5)


if __name__ == "__main__":
    raise SystemExit(main())
