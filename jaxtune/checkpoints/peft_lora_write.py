"""LoRA into PEFT's files: fused modules, and ranks and scales of each layer.

The A's of a fused module's parts are shared where they are equal; others are stacked, [3r, in],
beside a block-diagonal B, with the scale kept by alpha. Experts alike, each with its own A and B.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jaxtune.checkpoints.hf_export import gather
from jaxtune.checkpoints.peft_lora import MAGNITUDE, Setting
from jaxtune.checkpoints.peft_modules import PREFIX, Module, adaptable, all_modules, suffixes
from jaxtune.checkpoints.peft_parameters import A, B, packed, stems
from jaxtune.core.errors import RequestError
from jaxtune.core.quantize import ABSMAX, CODES, dense
from jaxtune.models.config import ModelConfig
from jaxtune.peft.lora import Lora


@dataclasses.dataclass(frozen=True)
class Pair:
    """What one layer adds to one of our linear layers: scale · A B, with A [in, r], B [r, out].

    Of experts, A is [E, in, r] and B [E, r, out].
    """

    a: np.ndarray
    b: np.ndarray
    scale: float
    magnitude: np.ndarray | None = None


def write_tensors(
    method: Lora, config: ModelConfig, flat: Mapping[str, Any]
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Returns (tensors by name, the fields of adapter_config.json that say what they are).

    Args:
        method: whose leaves they are.
        config: of the base.
        flat: {path: leaf}; DoRA on a part of a fused module needs the base's kernels too.

    Raises:
        RequestError: the family has no name for what is adapted.
    """
    known = {path for module in adaptable(config) for path in module.paths}
    places = [path.removesuffix("/lora/a") for path in flat if path.endswith("/lora/a")]
    if homeless := [place for place in places if place not in known]:
        raise RequestError(
            f"a {config.family} model of transformers has no {homeless[0]!r}, which is adapted; "
            "export format 'jaxtune'",
            key="format",
        )
    tensors: dict[Module, list[dict[str, np.ndarray]]] = {}
    settings: dict[Module, list[Setting | None]] = {}
    for module in adaptable(config):
        held = [f"{path}/lora/a" in flat for path in module.paths]
        if not any(held):
            continue
        layers = [
            layer_pairs(method, path, module, flat) if has else None
            for path, has in zip(module.paths, held, strict=True)
        ]
        settings[module], tensors[module] = [], []
        for i in range(len(module.names)):
            pairs = [None if one is None else one[i] for one in layers]
            made = joined(module, pairs, lambda n, i=i, m=module: kernel_norms(m, n, i, flat))
            settings[module].append(None if made is None else made[0])
            tensors[module].append({} if made is None else made[1])
    named = {
        f"{PREFIX}{stem}.{suffix}": tensor
        for module, names in stems(settings).items()
        for stem, one in zip(names, tensors[module], strict=True)
        for suffix, tensor in one.items()
    }
    return named, fields_of(method, config, settings)


def layer_pairs(method: Lora, path: str, module: Module, flat: Mapping[str, Any]) -> list[Pair]:
    """Returns the Pair of each layer of one of our linear layers.

    PiSSA's A B - A0 B0 is [A, A0] [B; -B0]; padding to the largest rank is cut away.
    """
    leaves = {
        name: gather(flat[f"{path}/lora/{name}"]).astype(np.float32)
        for name in ("a", "b", "a0", "b0", "magnitude", "scale")
        if f"{path}/lora/{name}" in flat
    }
    if module.layers is None:
        leaves = {name: leaf[None] for name, leaf in leaves.items()}
    a, b = leaves["a"], leaves["b"]
    if "a0" in leaves:
        a = np.concatenate([a, leaves["a0"]], axis=-1)
        b = np.concatenate([b, -leaves["b0"]], axis=-2)
    pairs = []
    for i in range(len(a)):
        rank = a.shape[-1]
        if method.per_layer:
            columns, rows = a[i].reshape(-1, rank), np.moveaxis(b[i], -2, 0).reshape(rank, -1)
            used = np.flatnonzero(np.any(columns, axis=0) | np.any(rows, axis=1))
            rank = 0 if not len(used) else int(used[-1]) + 1
            rank = max(rank, 1) if "magnitude" in leaves else rank
        pairs.append(
            Pair(
                a[i][..., :rank],
                b[i][..., :rank, :],
                float(leaves["scale"][i]) if method.per_layer else method.scale,
                leaves["magnitude"][i] if "magnitude" in leaves else None,
            )
        )
    return pairs


def joined(
    module: Module, pairs: list[Pair | None], norms: Callable[[int], np.ndarray]
) -> tuple[Setting, dict[str, np.ndarray]] | None:
    """Returns the setting and tensors of one layer of a module; None if nothing is adapted."""
    real = [(number, pair) for number, pair in enumerate(pairs) if pair is not None]
    dora = real[0][1].magnitude is not None
    if not dora and all(pair.a.shape[-1] == 0 for _, pair in real):
        return None
    first = max((pair for _, pair in real), key=lambda pair: pair.a.shape[-1])
    shared = all(np.array_equal(p.a, first.a) and p.scale == first.scale for _, p in real)
    a = first.a if shared else np.concatenate([pair.a for _, pair in real], axis=-1)
    b = np.zeros((*module.lead, a.shape[-1], module.d_out), np.float32)
    start = 0
    for number, pair in real:
        rank = pair.a.shape[-1]
        rows = np.zeros((*module.lead, a.shape[-1], pair.b.shape[-1]), np.float32)
        rows[..., start : start + rank, :] = pair.b * np.float32(pair.scale / first.scale)
        b[..., module.places(number)] = rows
        start += 0 if shared else rank
    tensors = dict(zip((A, B), packed(module, a, b), strict=True))
    if dora:
        magnitude = np.empty((module.d_out,), np.float32)
        for number, pair in enumerate(pairs):
            # a part that is not adapted keeps its columns' norms
            magnitude[module.places(number)] = norms(number) if pair is None else pair.magnitude
        tensors[MAGNITUDE] = magnitude
    return Setting(a.shape[-1], first.scale), tensors


def kernel_norms(module: Module, number: int, layer: int, flat: Mapping[str, Any]) -> np.ndarray:
    """Returns the column norms of the base's kernel, float32 [out]."""
    path = f"{module.paths[number]}/kernel"
    names = [name for name in (path, *(f"{path}/{n}" for n in (CODES, ABSMAX))) if name in flat]
    if not names:
        raise RequestError(f"parameter {path!r} is missing; DoRA beside it needs its norms")
    at = () if module.layers is None else (layer,)
    held = {name.rpartition("/")[2]: gather(flat[name], at) for name in names}
    kernel = dense(held.get("kernel", held), np.float32)
    return np.linalg.norm(np.asarray(kernel), axis=-2)


def fields_of(
    method: Lora, config: ModelConfig, settings: Mapping[Module, list[Setting | None]]
) -> dict[str, Any]:
    """Returns rank, alpha, their patterns and the targets of an adapter_config.json."""
    rslora = method.variant == "rslora"
    twice = 2 if method.variant == "pissa" else 1  # [A, A0] [B; -B0]
    alphas = {method.rank * twice: method.alpha * twice} if not method.per_layer else {}

    def pair(one: Setting) -> tuple[int, float]:
        # the very number where it is known; a scale went through float32
        exact = alphas.get(one.rank, one.scale * (math.sqrt(one.rank) if rslora else one.rank))
        near = round(exact, 4)
        alpha = near if abs(near - exact) <= 1e-6 * abs(exact) else exact
        return one.rank, int(alpha) if alpha == int(alpha) else alpha

    made = {m: [None if one is None else pair(one) for one in s] for m, s in settings.items()}
    counts = Counter(one for pairs in made.values() for one in pairs if one is not None)
    rank, alpha = counts.most_common(1)[0][0]
    ends = suffixes([module.name for module in made], all_modules(config))
    ends |= {module.name: module.name.rsplit("{}.", 1)[-1] for module in made if module.holder}
    targets: dict[bool, list[str]] = {False: [], True: []}
    ranks: dict[str, int] = {}
    scales: dict[str, float] = {}
    for module, pairs in made.items():
        uniform = len(set(pairs)) == 1
        every = list(zip(module.names, pairs, strict=True))
        named = [(ends[module.name], pairs[0])] if uniform else every
        for name, one in named:
            if one is not None:
                ranks |= {name: one[0]} if one[0] != rank else {}
                scales |= {name: one[1]} if one[1] != alpha else {}
        if None in pairs:
            targets[bool(module.holder)] += [name for name, one in every if one is not None]
        else:
            targets[bool(module.holder)].append(ends[module.name])
    parameters = {"target_parameters": sorted(targets[True])} if targets[True] else {}
    return parameters | {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0 if targets[True] else method.dropout,  # PEFT has none for parameters
        "target_modules": sorted(targets[False]),
        "bias": "none",
        "fan_in_fan_out": any(module.conv1d for module in made),
        "init_lora_weights": True,
        "use_rslora": rslora,
        "use_dora": method.variant == "dora",
        "rank_pattern": ranks,
        "alpha_pattern": scales,
    }
