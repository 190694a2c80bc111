"""Ten steps of TRL's DPOTrainer with a PEFT LoRA: what jaxtune's DPO must give.

python -m tests.goldens.dpo_trajectory --write     # rewrites dpo_trajectory.json
python -m tests.goldens.dpo_trajectory             # compares with it, shows how stable it is

To reproduce it elsewhere (numpy and safetensors are enough):

- `write_world(directory)` writes the plain tiny Llama of tiny.py and a LoRA adapter (rank 4, alpha
  8, every linear layer, no dropout) whose A is tiny.py's and whose B is 0: the policy starts as the
  base model. The reference is the base model, the adapter off, which is also what a copy of
  the adapter at the start would give.
- `batches()` gives the pairs of each step as token ids: prompt, chosen, rejected. The tokens of a
  completion are targets, the first one included; a prompt's are not. No token ends a completion.
- `RECIPE` holds the settings. AdamW (torch's and optax's agree), decay on every trained value,
  gradient clipped to a global norm of 1, constant learning rate.
- Of each step the file holds `loss` (mean over its pairs), `rewards/chosen`, `rewards/rejected`,
  `rewards/margins`, `rewards/accuracies` (means over its pairs, before the update), and `grad_norm`
  before clipping, over the adapter. At step 0: ln 2, and 0.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from tests.goldens import tiny

FILE = Path(__file__).with_name("dpo_trajectory.json")
STEPS, PAIRS = 10, 3
RECIPE = {
    "steps": STEPS,
    "batch_size": PAIRS,
    "loss": "sigmoid",
    "beta": 0.5,
    "lr": 1e-2,
    "b1": 0.9,
    "b2": 0.999,
    "eps": 1e-8,
    "weight_decay": 0.01,
    "clip_norm": 1.0,
}
SERIES = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")


def write_world(directory: Path) -> tuple[Path, Path]:
    """Writes the tiny Llama and the adapter that does nothing yet: (model, adapter)."""
    model, adapter = tiny.write_world(directory, "lora")
    tensors = tiny.adapter_tensors("lora", model)
    tensors = {k: np.zeros_like(v) if "lora_B" in k else v for k, v in tensors.items()}
    save_file(tensors, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    return model, adapter


def batches(seed: int = 5) -> list[list[dict[str, list[int]]]]:
    """STEPS lists of PAIRS {prompt, chosen, rejected} of token ids, ragged.

    A chosen completion follows x' = 5 x + 3 mod 97 from the prompt's last token, a rejected one is
    random.
    """
    rng = np.random.RandomState(seed)

    def draw(low: int, high: int) -> list[int]:
        return [int(x) for x in rng.randint(3, tiny.VOCAB, size=rng.randint(low, high + 1))]

    result = []
    for _ in range(STEPS):
        pairs = []
        for _ in range(PAIRS):
            prompt, rejected = draw(2, 6), draw(2, 9)
            chosen = [(5 * prompt[-1] + 3) % tiny.VOCAB]
            for _ in range(rng.randint(1, 8)):
                chosen.append((5 * chosen[-1] + 3) % tiny.VOCAB)
            pairs.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
        result.append(pairs)
    return result


def run(directory: Path, *, double: bool = False) -> dict[str, list[float]]:
    """Trains on files written to `directory`; returns the series of RECIPE's steps."""
    import torch
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from trl import DPOConfig, DPOTrainer

    from tests.goldens import reference

    dtype = torch.float64 if double else torch.float32
    net = reference.load_model(*write_world(directory), dtype=dtype)
    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(tiny.VOCAB)}, unk_token="t0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="t0", eos_token="t1")
    rows = [
        {f"{side}_ids": ids for side, ids in pair.items()} for step in batches() for pair in step
    ]
    losses = []

    class Recording(DPOTrainer):
        """Takes the token ids as they are and keeps the losses, which its log rounds off."""

        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset

        def compute_loss(self, *arguments: Any, **named: Any) -> Any:
            loss = super().compute_loss(*arguments, **named)
            losses.append(loss.item())
            return loss

    config = DPOConfig(
        output_dir=str(directory / "trl"),
        max_steps=STEPS,
        per_device_train_batch_size=PAIRS,
        train_sampling_strategy="sequential",
        loss_type=[RECIPE["loss"]],
        beta=RECIPE["beta"],
        learning_rate=RECIPE["lr"],
        lr_scheduler_type="constant",
        optim="adamw_torch",
        adam_beta1=RECIPE["b1"],
        adam_beta2=RECIPE["b2"],
        adam_epsilon=RECIPE["eps"],
        weight_decay=RECIPE["weight_decay"],
        max_grad_norm=RECIPE["clip_norm"],
        max_length=None,
        logging_steps=1,
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = Recording(
        net, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
    )
    trainer.train()
    log = [row for row in trainer.state.log_history if "rewards/margins" in row]
    if not len(losses) == len(log) == STEPS:
        raise RuntimeError(f"{len(losses)} losses and {len(log)} rows of log for {STEPS} steps")
    series = {name: [float(row[name]) for row in log] for name in (*SERIES, "grad_norm")}
    return {"loss": losses} | series


def distance(a: dict[str, list[float]], b: dict[str, list[float]]) -> float:
    """The largest difference of two runs, relative where the value is above 1."""
    x, y = (np.array([run[name] for name in sorted(b)]) for run in (a, b))
    return float(np.max(np.abs(x - y) / np.maximum(1.0, np.abs(y))))


def inputs(directory: Path) -> str:
    """The fingerprint of the weights and pairs that the run starts from."""
    return tiny.fingerprint(batches(), *tiny._tensors(*write_world(directory)))


def main() -> int:
    """Writes the goldens, or compares them with a new run; 1 if one is off by over 1e-5."""
    from tests.goldens import reference
    from tests.goldens.preference_losses import LIBRARIES, version

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help=f"rewrite {FILE.name}")
    write = parser.parse_args().write
    reference.quiet()
    with tempfile.TemporaryDirectory() as scratch:
        found = run(Path(scratch))
        with reference.exact_norms():
            double = distance(found, run(Path(scratch), double=True))
        report = {
            "versions": reference.versions() | {name: version(name) for name in LIBRARIES},
            "recipe": RECIPE,
            "inputs": inputs(Path(scratch)),
            "float64_error": double,
            "run": found,
        }
    for name, values in found.items():
        print(f"{name:20}", " ".join(f"{value:.4f}" for value in values))
    print(f"float64 {double:.1e}")
    if write:
        FILE.write_text(json.dumps(report, indent=1) + "\n")
        return 0
    change = distance(found, json.loads(FILE.read_text())["run"])
    print(f"golden {change:.1e}")
    return int(change > 1e-5)


if __name__ == "__main__":
    raise SystemExit(main())
