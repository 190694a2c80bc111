"""Adapter directories of either layout: Hugging Face PEFT's, or our own.

Neither knows how a base is held in memory, so a config is read as that of whole weights.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxtune.checkpoints import native_adapter, peft_files
from jaxtune.models.config import ModelConfig
from jaxtune.peft.method import Method


def read_method(
    directory: str | os.PathLike[str], config: ModelConfig, *, to_train: bool = False
) -> Method:
    """Returns the Method of an adapter directory; see `peft_files.read_method`."""
    if native_adapter.is_native(directory):
        return native_adapter.read_method(directory)
    return peft_files.read_method(directory, config.unquantized, to_train=to_train)


def is_scorer(directory: str | os.PathLike[str]) -> bool:
    """Tells whether an adapter makes a reward model of its base: it has a score head."""
    if native_adapter.is_native(directory):
        return native_adapter.has_score(directory)
    return peft_files.is_scorer(directory)


def load_adapter(
    directory: str | os.PathLike[str],
    config: ModelConfig,
    method: Method,
    base: Mapping[str, Any] | None = None,
) -> dict[str, np.ndarray]:
    """Returns {path: float32 array} of an adapter's leaves; see `peft_files.load_adapter`."""
    if native_adapter.is_native(directory):
        return native_adapter.load_adapter(directory, config.unquantized, method)
    return peft_files.load_adapter(directory, config.unquantized, method, base)


def needs_own_head(directory: str | os.PathLike[str], config: ModelConfig) -> bool:
    """Tells whether an adapter wants a tied model's head to be untied from its embedding."""
    if not config.tie_embeddings:
        return False
    if native_adapter.is_native(directory):
        return native_adapter.has_head(directory)
    return peft_files.needs_own_head(directory, config.unquantized)
