"""jaxtune adapts pretrained language models with JAX.

`load` opens a model, `train` runs a config, `plan` says what it will need; see `docs/python.md`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["load", "plan", "train"]

if TYPE_CHECKING:
    from jaxtune.recipes.load import load
    from jaxtune.recipes.plans.plan import plan
    from jaxtune.recipes.train import train

_HOMES = {
    "load": "jaxtune.recipes.load",
    "plan": "jaxtune.recipes.plans.plan",
    "train": "jaxtune.recipes.train",
}


def __getattr__(name: str) -> Any:
    # The command line must show its help without importing jax.
    if name not in _HOMES:
        raise AttributeError(f"module 'jaxtune' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
