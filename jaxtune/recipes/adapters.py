"""Several adapters beside one base: named, chosen, combined, merged."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from jaxtune.checkpoints import adapters as files
from jaxtune.checkpoints.hf_export import config_of, with_biases
from jaxtune.core.errors import RequestError, nearest
from jaxtune.core.tree import Tree, flatten, unflatten
from jaxtune.models.config import ModelConfig
from jaxtune.models.decoder import abstract_params
from jaxtune.peft.ia3 import Ia3
from jaxtune.peft.lora import Lora
from jaxtune.peft.method import Method
from jaxtune.recipes.assemble import plan_parts, with_method

EMBEDDING, HEAD = "embed/embedding", "lm_head/kernel"
Choice = str | Mapping[str, float] | None


@dataclasses.dataclass(frozen=True)
class Adapter:
    """What a method added to a base, or trained in it.

    Attributes:
        method: the method.
        leaves: {path: jax array}.
        own_head: the head of a tied base is a matrix of its own with it.
    """

    method: Method
    leaves: Mapping[str, Any]
    own_head: bool = False


@dataclasses.dataclass(frozen=True)
class Stand:
    """A base and the adapters beside it. Nothing is ever changed in place.

    Attributes:
        config: of the base.
        params: {path: jax array} of the base.
        adapters: by name.
    """

    config: ModelConfig
    params: Mapping[str, Any]
    adapters: Mapping[str, Adapter]

    def chosen(self, name: str) -> Adapter:
        """Returns an adapter by name.

        Raises:
            RequestError: there is none of this name.
        """
        if name not in self.adapters:
            held = ", ".join(self.adapters) or "none"
            raise RequestError(
                f"no adapter {name!r}; there are {held}{nearest(name, self.adapters)}",
                key="adapter",
            )
        return self.adapters[name]


def read(stand: Stand, path: str | Path, mesh: Mesh) -> Adapter:
    """Returns the adapter in a directory, on the devices of `mesh`.

    Raises:
        RequestError: the directory is missing or damaged, or does not fit the base.
    """
    own_head = files.needs_own_head(path, stand.config)
    config, params = with_head(stand, own_head)
    method = files.read_method(path, config)
    loaded = files.load_adapter(path, config, method, params)
    whole = with_method(params, plan_parts(config, method, mesh), 0, loaded)
    leaves = {p: leaf for p, leaf in whole.items() if p in loaded or p not in params}
    return Adapter(method, leaves, own_head)


def with_head(stand: Stand, own_head: bool) -> tuple[ModelConfig, dict[str, Any]]:
    """Returns config and parameters of the base, its head a copy of the embedding if asked."""
    if not own_head or not stand.config.tie_embeddings:
        return stand.config, dict(stand.params)
    config = dataclasses.replace(stand.config, tie_embeddings=False)
    return config, {**stand.params, HEAD: jnp.transpose(stand.params[EMBEDDING])}


def use(stand: Stand, choice: Choice) -> tuple[ModelConfig, Method, Tree]:
    """Returns (config, method, parameters) of the base with adapters.

    Args:
        stand: base and adapters.
        choice: a name; {name: weight}; None for the base alone.

    Raises:
        RequestError: an unknown name, or adapters that cannot be weighed.
    """
    adapter = weighed(stand, choice)
    if adapter is None:
        return stand.config, Method(), unflatten(stand.params)
    config, params = with_head(stand, adapter.own_head)
    return config, adapter.method, unflatten({**params, **adapter.leaves})


def weighed(stand: Stand, choice: Choice) -> Adapter | None:
    """Returns the one adapter that a choice comes to, or None."""
    if choice is None:
        return None
    if isinstance(choice, str):
        return stand.chosen(choice)
    parts = [(stand.chosen(name), float(weight)) for name, weight in choice.items()]
    if not parts:
        return None
    wrong = next((weight for _, weight in parts if not math.isfinite(weight)), None)
    if wrong is not None:
        raise RequestError(f"the weight {wrong} is not finite", key="adapter")
    if len(parts) == 1 and parts[0][1] == 1.0:
        return parts[0][0]
    if any(adapter.method.new_rows is not None for adapter, _ in parts):
        raise RequestError("an adapter with new tokens cannot be weighed", key="adapter")
    own_head = any(adapter.own_head for adapter, _ in parts)
    config, base = with_head(stand, own_head)
    methods = [adapter.method for adapter, _ in parts]
    if all(isinstance(m, Lora) and m.variant != "dora" for m in methods):
        method, leaves = sum_of_loras(parts, flatten(abstract_params(config.unquantized, Method())))
    elif all(isinstance(method, Ia3) for method in methods):
        method, leaves = sum_of_scales(parts)
    else:
        raise RequestError(
            "only LoRA adapters (but DoRA) or only IA3 adapters can be weighed; these are "
            + ", ".join(sorted({getattr(m, "variant", m.name) for m in methods})),
            key="adapter",
        )
    trained = {
        path: leaf.astype(jnp.float32)
        for path, leaf in base.items()
        if any(path in adapter.leaves for adapter, _ in parts)
    }
    for path, start in trained.items():
        held = [(a.leaves[path], w) for a, w in parts if path in a.leaves]
        leaves[path] = start + sum(weight * (leaf - start) for leaf, weight in held)
    return Adapter(dataclasses.replace(method, train=tuple(trained)), leaves, own_head)


def sum_of_loras(
    parts: list[tuple[Adapter, float]], shapes: Mapping[str, Any]
) -> tuple[Method, dict[str, Any]]:
    """Returns the LoRA whose A B is the weighted sum of the scaled A B, its rank the sum of ranks.

    A = [A₁, A₂, …] and B = [w₁ s₁ B₁; w₂ s₂ B₂; …] are exact; PiSSA's start is one more pair,
    -A0 B0. A layer that an adapter leaves out has zeros.
    """
    places = [p.removesuffix("/lora/a") for a, _ in parts for p in a.leaves if p.endswith("/a")]
    rank = sum(pairs_of(adapter.method) * adapter.method.rank for adapter, _ in parts)
    leaves = {}
    for place in dict.fromkeys(places):
        *lead, d_in, d_out = shapes[f"{place}/kernel"].shape
        left, right = [], []
        for adapter, weight in parts:
            held = {n: adapter.leaves.get(f"{place}/lora/{n}") for n in ("a", "b", "a0", "b0")}
            method = adapter.method
            if held["a"] is None:
                width = pairs_of(method) * method.rank
                left.append(jnp.zeros((*lead, d_in, width), jnp.float32))
                right.append(jnp.zeros((*lead, width, d_out), jnp.float32))
                continue
            scale = method.scale
            if method.per_layer:
                scale = adapter.leaves[f"{place}/lora/scale"]
                scale = jnp.expand_dims(scale, range(scale.ndim, len(lead) + 2))
            left.append(held["a"])
            right.append(weight * scale * held["b"])
            if held["a0"] is not None:
                left.append(held["a0"])
                right.append(-weight * scale * held["b0"])
        leaves[f"{place}/lora/a"] = jnp.concatenate(left, axis=-1)
        leaves[f"{place}/lora/b"] = jnp.concatenate(right, axis=-2)
    return Lora(rank=rank, alpha=float(rank), targets=tuple(dict.fromkeys(places))), leaves


def pairs_of(method: Lora) -> int:
    """Returns how many pairs of matrices a layer has."""
    return 2 if method.variant == "pissa" else 1


def sum_of_scales(parts: list[tuple[Adapter, float]]) -> tuple[Method, dict[str, Any]]:
    """Returns the IA3 with scales 1 + Σ w (s - 1); a layer that an adapter leaves out has s = 1."""
    paths = dict.fromkeys(p for a, _ in parts for p in a.leaves if p.endswith("/ia3/scale"))
    leaves = {
        path: 1.0 + sum(w * (a.leaves[path] - 1.0) for a, w in parts if path in a.leaves)
        for path in paths
    }
    return Ia3(targets=tuple(path.removesuffix("/ia3/scale") for path in paths)), leaves


def merge(stand: Stand, choice: Choice) -> Stand:
    """Returns the stand whose base has adapters merged in; those that were not chosen stay.

    Merging is done in float32 and stored in the dtype of the base; of a quantised base all kernels
    become whole weights.

    Raises:
        RequestError: what `use` raises; a method that cannot be merged, no family that holds the
            result, or an adapter that stays and no longer fits.
    """
    names = {choice} if isinstance(choice, str) else set(choice or ())
    config, method, params = use(stand, choice)
    merged = method.merge(params)
    config = config_of(config, merged)
    flat = flatten(with_biases(config, merged))
    old = stand.params
    dtype = {path: old[path if path in old else EMBEDDING].dtype for path in flat}
    rest = {name: a for name, a in stand.adapters.items() if name not in names}
    stayed = Stand(config, {path: leaf.astype(dtype[path]) for path, leaf in flat.items()}, rest)
    for name in rest:
        check_fit(stayed, name)
    return stayed


def check_fit(stand: Stand, name: str) -> None:
    """Raises RequestError unless base and adapter together are what the method wants."""
    adapter = stand.chosen(name)
    config, params = with_head(stand, adapter.own_head)
    wanted = flatten(abstract_params(config, adapter.method))
    held = {**params, **adapter.leaves}
    if {p: x.shape for p, x in wanted.items()} != {p: x.shape for p, x in held.items()}:
        raise RequestError(f"adapter {name!r} does not fit the base", key="adapter")
