"""Rewrites tests/recipes/goldens: every shipped config, resolved.

python -m tests.recipes.write_goldens
"""

from __future__ import annotations

import json
import pathlib

from jaxtune.cli import config_file
from jaxtune.recipes.sweep.hyper import Hyper
from jaxtune.recipes.sweep.sweep import plan

CONFIGS = pathlib.Path(__file__).resolve().parents[2] / "configs"
GOLDENS = pathlib.Path(__file__).resolve().parent / "goldens"

# what a user must give, for every config that asks for it
MODEL = ("model.path", "MODEL_DIR")
TRAIN = ("data.train[0].source", "jsonl:train.jsonl")
EVAL = ("data.eval[0].source", "jsonl:held_out.jsonl")
TOKENIZER = ("model.tokenizer", "TOKENIZER_DIR")
TEACHER = ("objective.teacher", "TEACHER_DIR")
GIVEN = {
    "distill": (MODEL, TEACHER, TRAIN),
    "pretrain_tiny": (TOKENIZER, TRAIN),
    "lora_sweep": (MODEL, TRAIN, EVAL),
}
ARGUMENTS = {
    "sft_lora": ("", "rslora", "dora", "pissa"),
    "sft_adapter": ("", "pfeiffer", "parallel"),
    "dpo": ("", "sigmoid_norm", "robust", "hinge", "ipo"),
    "distill": ("", "reverse", "jsd"),
    "grpo": ("", "dr_grpo", "dapo", "gspo", "rloo", "reinforce++"),
}


def given(name: str) -> tuple[tuple[str, str], ...]:
    """Returns the overrides without which a shipped config is refused."""
    return GIVEN.get(name, (MODEL, TRAIN))


def resolved(name: str) -> dict:
    """Returns the resolved config, one for each argument, and the trials of its sweep."""
    out = {}
    for argument in ARGUMENTS.get(name, ("",)):
        spec = f"{CONFIGS / name}.py" + (f":{argument}" if argument else "")
        loaded = config_file.load(spec, given(name))
        out[argument or "default"] = loaded.resolve().to_dict()
        if loaded.get_hyper is not None:
            trials = plan(loaded.raw, loaded.hyper(Hyper()))
            out["trials"] = [trial.directory for trial in trials]
    return out


def text(name: str) -> str:
    """Returns the golden file's text."""
    return json.dumps(resolved(name), indent=1) + "\n"


if __name__ == "__main__":
    for path in sorted(CONFIGS.glob("*.py")):
        (GOLDENS / f"{path.stem}.json").write_text(text(path.stem))
