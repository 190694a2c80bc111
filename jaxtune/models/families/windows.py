"""Sliding windows of single layers in config.json: `use_sliding_window` and `layer_types`."""

from __future__ import annotations

from typing import Any

from jaxtune.models.config import ModelConfig
from jaxtune.models.families.reader import Reader

FULL, SLIDING = "full_attention", "sliding_attention"


def plain_window(read: Reader, default: int | None = None) -> int | None:
    """Returns `sliding_window`; `default` is transformers' where the field is absent."""
    if read.take("sliding_window") is None:
        return default if "sliding_window" not in read.raw else None
    return read.integer("sliding_window")


def switched_window(read: Reader, default: int | None = None) -> int | None:
    """Returns `sliding_window` where `use_sliding_window` switches it on, else None."""
    size = plain_window(read, default)
    return size if read.flag("use_sliding_window") else None


def layer_windows(read: Reader, window: int | None, sliding: list[bool]) -> list[int | None]:
    """Returns each layer's window, as `layer_types` says, or `sliding` where it is absent.

    Raises:
        RequestError: `layer_types` has layers that slide, and no window is switched on.
    """
    types = read.layer_types(len(sliding))
    if types is not None:
        sliding = [kind == SLIDING for kind in types]
        if any(sliding) and window is None:
            message = f"{SLIDING!r} layers, but neither sliding_window nor use_sliding_window is on"
            raise read.refuse("layer_types", message)
    return [window if slides else None for slides in sliding]


def windows_to_hf(config: ModelConfig) -> dict[str, Any]:
    """Returns the fields of the layers' windows; all that slide have one size."""
    windows = [config.kinds[kind].window for kind in config.layer_kinds]
    size = next((window for window in windows if window is not None), None)
    return {
        "use_sliding_window": size is not None,
        "sliding_window": size,
        "layer_types": [FULL if window is None else SLIDING for window in windows],
    }
