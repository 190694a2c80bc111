"""What the tensors of a PEFT file must be, before any is used."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from jaxtune.checkpoints.hf import FLOATS
from jaxtune.checkpoints.hf_export import gather
from jaxtune.checkpoints.peft_modules import EMBEDDING, HEAD, PREFIX, base_shapes, tied_pair
from jaxtune.checkpoints.safetensors import TensorFile
from jaxtune.core.errors import RequestError
from jaxtune.core.tree import flatten
from jaxtune.models.config import ModelConfig
from jaxtune.models.decoder import abstract_params
from jaxtune.peft.method import Method


def base_copies(
    file: TensorFile,
    wanted: Mapping[str, tuple[int, ...]],
    config: ModelConfig,
    base: Mapping[str, Any],
) -> set[str]:
    """Returns the names of tensors that repeat the base's embedding or head.

    PEFT saves them beside an adapter on the head, and after a vocabulary was resized to the same.

    Raises:
        RequestError: one that differs from the base's, by more than the coarser of their dtypes.
    """
    embedding, head = tied_pair(config)
    places = {embedding: EMBEDDING, head: HEAD if HEAD in base else EMBEDDING}
    found = set()
    for module, path in places.items():
        for name in (f"{PREFIX}{module}.weight", f"{PREFIX}{module}.base_layer.weight"):
            if name not in file.entries or name in wanted or path not in base:
                continue
            ours, copy = gather(base[path]), file.read(name)
            ours = ours.T if path == HEAD else ours
            if ours.shape != copy.shape or not (
                np.array_equal(ours.astype(copy.dtype), copy)
                or np.array_equal(ours, copy.astype(ours.dtype))
            ):
                raise RequestError(
                    f"{name!r} is not the base's {path!r}: the adapter is of another base, or of "
                    "one whose vocabulary or weights were changed",
                    where=file.path,
                )
            found.add(name)
    return found


def check_tensors(
    file: TensorFile,
    wanted: Mapping[str, tuple[int, ...]],
    method: Method,
    copies: Collection[str] = (),
    named: str | None = None,
) -> None:
    """Refuses tensors that are missing, left over, of another shape, or not floats, by name.

    Args:
        file: the adapter's tensors.
        wanted: {name: shape} of what method and base want.
        method: of the adapter.
        copies: names of the base's own weights that may be in the file.
        named: the base that the adapter names as its own.
    """
    made = f"; the adapter names {named!r} as its base" if named else ""
    missing = [name for name in wanted if name not in file.entries]
    extra = [name for name in file.entries if name not in wanted and name not in copies]
    if missing:
        hint = f" (and it holds {extra[0]!r}, which has no place)" if extra else ""
        raise RequestError(
            f"{len(missing)} of {len(wanted)} tensors are missing, the first is "
            f"{missing[0]!r}{hint}{made}",
            where=file.path,
        )
    if extra:
        # PEFT adds the base's own weights where an embedding or the head is targeted or resized
        copies = any("base_layer" in name or "embed_tokens" in name for name in extra)
        hint = "; save it in PEFT with save_embedding_layers=False" if copies else ""
        raise RequestError(
            f"{len(extra)} tensors have no place in method {method.name!r} on this model, the "
            f"first is {extra[0]!r}{hint}{made}",
            where=file.path,
        )
    for name, shape in wanted.items():
        entry = file.entries[name]
        if entry.shape != shape or entry.dtype.name not in FLOATS:
            raise RequestError(
                f"{name!r} is {entry.dtype.name}{list(entry.shape)}; method and base want a float "
                f"of shape {list(shape)}{made}",
                where=file.path,
            )


def check_leaves(config: ModelConfig, method: Method, leaves: Mapping[str, np.ndarray]) -> None:
    """Refuses a method that is not the file's."""
    base = base_shapes(config)
    wanted = {
        path: leaf.shape
        for path, leaf in flatten(abstract_params(config, method)).items()
        if path not in base and not path.endswith(("/a0", "/b0"))
    }
    if wanted != {path: leaf.shape for path, leaf in leaves.items()}:
        path = next(iter(wanted.keys() ^ leaves.keys()), next(iter(wanted), ""))
        raise RequestError(f"method {method.name!r} is not that of the adapter: see {path!r}")
