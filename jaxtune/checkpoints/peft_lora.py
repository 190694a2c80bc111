"""LoRA out of PEFT's files: fused modules, and ranks and scales of each layer.

A fused module (Phi-3's qkv_proj) has one A and one B where we have a pair for each of its parts:
each part is given the shared A and its rows of B. So it is with the gates and the linear halves of
experts.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxtune.checkpoints.hf_export import gather
from jaxtune.checkpoints.peft_modules import PREFIX, Module, expert_modules, linears
from jaxtune.checkpoints.peft_parameters import (
    A,
    B,
    check_parameters,
    parameters_of,
    read_pair,
    stems,
)
from jaxtune.checkpoints.peft_targets import check_pattern, pattern_value, targets_of
from jaxtune.core.errors import RequestError
from jaxtune.models.config import ModelConfig
from jaxtune.peft.lora import Lora
from jaxtune.peft.method import is_routed

MAGNITUDE = "lora_magnitude_vector"
# Starts of A and B that leave the base's weights alone. The others subtract from them.
PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal", "mica")
PATTERNS = (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern"))


@dataclasses.dataclass(frozen=True)
class Setting:
    """Rank and scale of one module of one layer."""

    rank: int
    scale: float


Scope = dict[Module, list[Setting | None]]


def scope_of(fields: Mapping[str, Any], config: ModelConfig, where: Path) -> Scope:
    """Returns the setting of each layer of each targeted module, None where it is not adapted.

    Raises:
        RequestError: what `targets_of` and `parameters_of` raise; a rank or alpha that is no
            positive number.
    """
    root = math.sqrt if fields.get("use_rslora") else float

    ranks, alphas = (numbers(fields, *names, where) for names in PATTERNS)

    def setting(module: Module, name: str) -> Setting:
        found = set()
        for one in module.each(name):
            rank = pattern_value(ranks[1], one, ranks[0])
            found.add(Setting(rank, pattern_value(alphas[1], one, alphas[0]) / root(rank)))
        if len(found) > 1:
            raise RequestError(
                f"experts of {name!r} with ranks or scales of their own are not supported",
                key="rank_pattern",
                where=where,
            )
        return found.pop()

    among = (*linears(config), *expert_modules(config))
    found = targets_of(fields, config, where, among) | parameters_of(fields, config, where)
    return {
        module: [
            setting(module, name) if hit else None
            for name, hit in zip(module.names, hits, strict=True)
        ]
        for module, hits in found.items()
    }


def numbers(
    fields: Mapping[str, Any], name: str, pattern: str, where: Path
) -> tuple[Any, dict[str, Any]]:
    """Returns the value for all modules and {pattern: value} for some; both are checked."""
    patterns, default = fields.get(pattern) or {}, fields.get(name, 8)
    if not isinstance(patterns, dict):
        raise RequestError("an object is wanted", key=pattern, where=where)
    for key in patterns:
        check_pattern(key, pattern, where)
    whole = name == "r"
    for key, value in ((name, default), *((pattern, value) for value in patterns.values())):
        kinds = int if whole else int | float
        sound = isinstance(value, kinds) and not isinstance(value, bool)
        if not sound or not whole <= value <= sys.float_info.max:  # neither NaN nor infinity
            wanted = "a positive integer" if whole else "a number"
            raise RequestError(f"{wanted} is wanted, not {value!r}", key=key, where=where)
    return default, patterns


def method_of(fields: Mapping[str, Any], config: ModelConfig, where: Path) -> Lora:
    """Returns the Lora of a LORA config.

    Raises:
        RequestError: a setting that cannot be honoured, by name.
    """
    rate = fields.get("lora_dropout", 0.0)
    if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 <= rate < 1:
        raise RequestError(
            f"a number from 0 to below 1 is wanted, not {rate!r}", key="lora_dropout", where=where
        )
    if fields.get("bias", "none") != "none":
        raise RequestError(
            f"{fields['bias']!r} is not supported; only 'none' is", key="bias", where=where
        )
    start = fields.get("init_lora_weights", True)
    if start not in (*PLAIN_STARTS, "pissa"):
        raise RequestError(
            f"an adapter started by {start!r} belongs to changed base weights; save it in PEFT "
            "with path_initial_model_for_weight_conversion first",
            key="init_lora_weights",
            where=where,
        )
    scope = scope_of(fields, config, where)
    check_parameters(fields, list(scope), where)
    settings = [one for layers in scope.values() for one in layers]
    per_layer = len(set(settings)) > 1
    rank = max(one.rank for one in settings if one is not None)
    alpha, rslora = float(fields.get("lora_alpha", 8)), bool(fields.get("use_rslora"))
    variant = "rslora" if rslora else "lora"
    for name in ("rank_pattern", "alpha_pattern"):
        if fields.get(name) and not per_layer:  # all that is adapted agrees after all
            scale = next(one.scale for one in settings if one is not None)
            alpha = scale * (math.sqrt(rank) if rslora else rank)
    if start == "pissa":
        check_pissa(fields, scope, per_layer, where)
        variant, rslora = ("pissa", rslora)
    if fields.get("use_dora"):
        variant = "dora"
        partial = next((m for m, layers in scope.items() if None in layers), None)
        if partial is not None:
            raise RequestError(
                f"DoRA on some layers of {partial.name!r} only is not supported",
                key="use_dora",
                where=where,
            )
    if rslora and variant != "rslora":  # alpha / √r written as (alpha √r) / r
        alpha = alpha * math.sqrt(rank)
    return Lora(
        rank=rank,
        alpha=alpha,
        # that of experts is not ours, see `check_parameters`; no training reads it from here
        dropout=0.0 if any(is_routed(m.paths[0]) for m in scope) else float(rate),
        targets=tuple(path.rsplit("/", 1)[-1] for module in scope for path in module.paths),
        variant=variant,
        per_layer=per_layer,
    )


def check_pissa(fields: Mapping[str, Any], scope: Scope, per_layer: bool, where: Path) -> None:
    """Refuses a PiSSA whose start, which the file lacks, ours would not equal."""
    if fields.get("use_dora"):
        raise RequestError("cannot be combined with 'pissa'", key="use_dora", where=where)
    fused = next((module.name for module in scope if len(module.paths) > 1), None)
    if per_layer or fused:
        reason = f"of the fused {fused!r}" if fused else "with ranks or scales that differ"
        raise RequestError(
            f"'pissa' {reason} is not supported; convert it in PEFT with "
            "path_initial_model_for_weight_conversion",
            key="init_lora_weights",
            where=where,
        )


def shapes_of(method: Lora, scope: Scope) -> dict[str, tuple[int, ...]]:
    """Returns {tensor name: shape} of the adapter's file."""
    shapes: dict[str, tuple[int, ...]] = {}
    for module, names in stems(scope).items():
        for name, one in zip(names, scope[module], strict=True):
            if one is None:
                continue
            each = module.each(name)
            rank = one.rank * math.prod(module.lead) // len(each)
            for stem in each:
                shapes[f"{PREFIX}{stem}.{A}"] = (rank, module.d_in)
                shapes[f"{PREFIX}{stem}.{B}"] = (module.d_out, rank)
            if method.variant == "dora":
                shapes[f"{PREFIX}{name}.{MAGNITUDE}"] = (module.d_out,)
    return shapes


def read_leaves(
    method: Lora, scope: Scope, read: Callable[[str], np.ndarray]
) -> dict[str, np.ndarray]:
    """Returns {path: float32 leaf} of the method's leaves.

    Args:
        method: what `method_of` gave.
        scope: what `scope_of` gave.
        read: a tensor's name → the tensor.
    """
    leaves: dict[str, np.ndarray] = {}
    for module, names in stems(scope).items():
        settings, rank = scope[module], method.rank
        lead = (len(settings), *module.lead)
        for number, (path, width) in enumerate(zip(module.paths, module.widths, strict=True)):
            new = {
                "a": np.zeros((*lead, module.d_in, rank), np.float32),
                "b": np.zeros((*lead, rank, width), np.float32),
            }
            if method.variant == "dora":
                new["magnitude"] = np.zeros((*lead, width), np.float32)
            if method.per_layer:
                new["scale"] = np.ones(lead[:1], np.float32)
            for i, (name, one) in enumerate(zip(names, settings, strict=True)):
                if one is None:
                    continue
                where, key = module.places(number), f"{PREFIX}{name}"
                a, b = read_pair(module, key, read)
                new["a"][i, ..., : one.rank] = a
                new["b"][i, ..., : one.rank, :] = b[..., where]
                if method.variant == "dora":
                    new["magnitude"][i] = read(f"{key}.{MAGNITUDE}")[where]
                if method.per_layer:
                    new["scale"][i] = one.scale
            for name, leaf in new.items():
                leaves[f"{path}/lora/{name}"] = leaf if module.layers is not None else leaf[0]
    return leaves


def pissa_starts(
    method: Lora, params: Mapping[str, Any], leaves: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """Returns {path: float32 a0 or b0} of a PiSSA whose file lacks its start; {} of other methods.

    scale · A0 B0 is what PEFT takes from the base: the best rank-r approximation of each kernel,
    by the full decomposition (PiSSA, equations 2 to 4), in float64. A run's own start is only near
    to it, which is enough for a run that keeps it, and not for a file that was trained on another.

    Args:
        method: what `method_of` gave.
        params: {path: leaf} of the base; its kernels are read a layer at a time.
        leaves: what `read_leaves` gave.
    """
    if not isinstance(method, Lora) or method.variant != "pissa":
        return {}
    starts: dict[str, np.ndarray] = {}
    for path, leaf in leaves.items():
        stem, _, name = path.rpartition("/lora/")
        if name != "a" or f"{stem}/lora/a0" in leaves:
            continue
        kernel = params[f"{stem}/kernel"]
        b = leaves[f"{stem}/lora/b"]
        a0, b0 = np.empty(leaf.shape, np.float32), np.empty(b.shape, np.float32)
        for at in np.ndindex(*kernel.shape[:-2]):
            whole = gather(kernel, at).astype(np.float64)
            u, s, vt = np.linalg.svd(whole, full_matrices=False)
            root = np.sqrt(s[: method.rank] / method.scale)
            a0[at], b0[at] = u[:, : method.rank] * root, vt[: method.rank] * root[:, None]
        starts |= {f"{stem}/lora/a0": a0, f"{stem}/lora/b0": b0}
    return starts
