"""Writes docs/families.md by running the families' tests: `make families-page` (some minutes).

Needs torch, transformers and peft, as the tests in tests/models/test_families_*.py do.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = Path(__file__).with_name("families.md")
sys.path.insert(0, str(ROOT))

# The published models of each family.
MODELS = {
    "llama": "Llama 2, 3, 3.1, 3.2, 3.3; SmolLM2, TinyLlama",
    "mistral": "Mistral 7B",
    "mixtral": "Mixtral 8x7B, 8x22B",
    "qwen2": "Qwen2, Qwen2.5, QwQ (dense)",
    "qwen3": "Qwen3 (dense)",
    "qwen3_moe": "Qwen3-30B-A3B, Qwen3-235B-A22B",
    "olmo2": "OLMo 2",
    "smollm3": "SmolLM3",
    "granite": "Granite 3 (dense)",
    "gpt_oss": "gpt-oss-20b, gpt-oss-120b",
    "gemma": "Gemma",
    "gemma2": "Gemma 2",
    "gemma3_text": "Gemma 3, text (1B, and others saved as text)",
    "gpt2": "GPT-2",
    "gpt_neox": "GPT-NeoX, Pythia",
    "phi3": "Phi-3, Phi-3.5-mini, Phi-4, Phi-4-mini",
}
HEAD = """# Families of models

Written by `make families-page` from the tests in `tests/models`; not edited by hand.

A directory of Hugging Face files is read by its `config.json` alone; code that lies beside it is
never run. Each family is checked on tiny random checkpoints that transformers wrote, with every
bias, norm and router random:

- **logits**: the largest difference from transformers' logits in float32, relative to the largest
  logit, over all variants of the family (named below) and over left and right padding; samples of
  40, 17 and 6 tokens go beyond windows of 7 tokens and original contexts of 16. The bound is
  1e-4.
- **generation**: greedy tokens through the key-value cache that equal those of transformers.
- **LoRA training**: the largest relative difference of the gradient of a parameter, of the base
  or of LoRA, from torch's.
- **export**: read and written again, every tensor has the same name, shape and bytes, in float32
  and in bfloat16; the number is the difference of the logits when transformers loads what was
  written.
- **adapter export**: the difference of the logits when the real `peft` loads a LoRA of all linear
  layers.
- **sharded load**: the difference of the parameters when 8 devices (data, fsdp and tensor 2 each)
  load their parts.
- **fields**: how many other values of single fields of `config.json` were tried, of these how many
  were read (our logits are then again those of transformers, changed or not), and how many were
  refused by name. There is no third kind.

Every run of the tests in continuous integration takes these checks of every family again and holds
each difference to 1e-4 (that of a sharded load to 0, tokens, bytes and refusals to equality). It
also measures the differences of one family as this page does and compares them with its figures.
What has changed is written by `make families-page`.
"""


def differences(names: list[str], directory: Path) -> dict[str, str]:
    """Returns the cells of the differences from transformers, torch, peft and a whole load."""
    from tests.models import family_checks as checks
    from tests.models import family_training as training

    worlds, sides = [checks.world(name) for name in names], ("right", "left")
    return {
        "logits": figure(max(checks.logits_error(w, side) for w in worlds for side in sides)),
        "LoRA training": figure(training.training_error(names[0], directory / "training")),
        "adapter export": figure(training.adapter_error(names[0], directory / "adapter")),
        "sharded load": figure(training.sharded_error(names[0])),
    }


def measure(model_type: str, directory: Path) -> dict[str, str]:
    """Returns the cells of one family's row, and its variants."""
    from tests.models import family_checks as checks
    from tests.models.families import ROWS
    from tests.models.test_families_live import verdict

    names = [name for name, fields in ROWS.items() if fields["model_type"] == model_type]
    worlds = [checks.world(name) for name in names]
    ours, theirs = checks.greedy(worlds[0], worlds[0].samples)
    same = sum(a == b for x, y in zip(ours, theirs, strict=True) for a, b in zip(x, y, strict=True))
    again = []
    for number, w in enumerate(worlds):
        written, expected, apart = checks.exported(w, directory / f"f32-{number}")
        assert written == expected, names[number]
        again.append(apart)
    half, expected = checks.exported_bf16(worlds[0], directory / "bf16")
    assert half == expected
    raw = json.loads((worlds[0].directory / "config.json").read_text())
    honoured = refused = 0
    for number, (field, changed) in enumerate(checks.perturbations(raw)):
        outcome = checks.perturbed(worlds[0], changed, directory / f"field-{number}")
        assert verdict(field, worlds[0], outcome) is None, field
        refused += isinstance(outcome.ours, Exception)
        honoured += not isinstance(outcome.ours, Exception)
    apart = differences(names, directory)
    return {
        "logits": apart["logits"],
        "generation": f"{same} of {sum(map(len, theirs))}",
        "LoRA training": apart["LoRA training"],
        "export": f"same bytes, {figure(max(again))}",
        "adapter export": apart["adapter export"],
        "sharded load": apart["sharded load"],
        "fields": f"{honoured + refused}: {honoured} + {refused}",
        "variants": ", ".join(names),
    }


def figure(value: float) -> str:
    """Returns a difference in two figures.

    >>> figure(1.234e-6), figure(0.0)
    ('1.2e-06', '0')
    """
    return f"{value:.1e}" if value else "0"


def page() -> str:
    """Returns the text of the page, from a run of all checks."""
    from importlib.metadata import version

    from jaxtune.models.families.registry import FAMILIES

    rows = {}
    with tempfile.TemporaryDirectory() as scratch:
        for model_type in FAMILIES:
            start = time.monotonic()
            rows[model_type] = measure(model_type, Path(scratch) / model_type)
            print(f"{model_type}: {time.monotonic() - start:.0f} s", flush=True)
    columns = [name for name in rows["llama"] if name != "variants"]
    lines = [HEAD, f"| `model_type` | models | {' | '.join(columns)} |"]
    lines.append("|---" * (len(columns) + 2) + "|")
    for model_type, cells in rows.items():
        shown = " | ".join(cells[name] for name in columns)
        lines.append(f"| `{model_type}` | {MODELS[model_type]} | {shown} |")
    lines.append("\nVariants (rows of `tests/models/families.py`):\n")
    lines += [f"- `{name}`: {cells['variants']}" for name, cells in rows.items()]
    used = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft", "jax"))
    return "\n".join(lines) + f"\n\nMeasured with {used} on a CPU.\n"


if __name__ == "__main__":
    import tests.conftest  # noqa: F401 - the tests' own settings of XLA

    PAGE.write_text(page(), encoding="utf-8")
