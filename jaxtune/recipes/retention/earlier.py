"""The adapters of earlier runs, from whose subspaces a LoRA run is to stay away (O-LoRA)."""

from __future__ import annotations

from typing import Any

import numpy as np

from jaxtune.checkpoints import adapters
from jaxtune.core.errors import RequestError
from jaxtune.core.tree import flatten
from jaxtune.optim.orthogonal import Push
from jaxtune.peft.lora import Lora
from jaxtune.recipes.assemble import Parts

FACTOR = "/lora/a"  # ends the path of an A


def push_of(config: Any, parts: Parts) -> Push:
    """Returns the Push of a resolved config; one of strength 0 where `retention.olora` is 0.

    Raises:
        RequestError: a directory without a LoRA adapter that fits the model, one that shares no
            layer with what is trained, or PiSSA, whose change does not lie in the columns of A.
    """
    strength = config.retention.get("olora", 0.0)
    if not strength:
        return Push()
    if parts.method.variant == "pissa":
        raise RequestError(
            "'pissa' starts inside of the base's own largest directions; use 'lora', 'rslora' or "
            "'dora'",
            key="retention.olora",
        )
    shapes = flatten(parts.split(parts.shapes)[0])
    trained = {
        path: leaf.shape
        for path, leaf in shapes.items()
        if leaf is not None and path.endswith(FACTOR)
    }
    found: dict[str, list[np.ndarray]] = {}
    for i, directory in enumerate(config.retention.olora_from):
        for path, leaf in factors(directory, parts, trained, f"retention.olora_from[{i}]").items():
            found.setdefault(path, []).append(leaf)
    return Push(strength, {p: np.concatenate(held, axis=-1) for p, held in found.items()})


def factors(
    directory: str, parts: Parts, trained: dict[str, tuple[int, ...]], key: str
) -> dict[str, np.ndarray]:
    """Returns {path: A [..., in, r]} of an adapter directory, where the run trains an A too."""
    method = adapters.read_method(directory, parts.config)
    if not isinstance(method, Lora):
        raise RequestError(f"holds a {method.name} adapter, not lora", key=key, where=directory)
    if method.variant == "pissa":
        raise RequestError(
            "holds a PiSSA adapter, whose change is not in the columns of A; convert it to LoRA",
            key=key,
            where=directory,
        )
    held = adapters.load_adapter(directory, parts.config, method)
    shared = {path: np.asarray(leaf) for path, leaf in held.items() if path in trained}
    if not shared:
        raise RequestError(
            "has no layer in common with peft.targets: there is nothing to stay away from",
            key=key,
            where=directory,
        )
    return shared
