"""`jaxtune plan --fit`: the fastest settings of a config that fit the devices."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from jaxtune.core.errors import RequestError
from jaxtune.core.tree import flatten
from jaxtune.parallel.mesh import abstract_mesh
from jaxtune.peft.method import FROZEN
from jaxtune.planning import chips
from jaxtune.planning import fit as search
from jaxtune.planning.fit import Setting, Trial
from jaxtune.recipes import build
from jaxtune.recipes.assemble import plan_parts
from jaxtune.recipes.plan_draft import Draft, draft
from jaxtune.recipes.plan_length import for_planning
from jaxtune.recipes.plan_report import analyse, report
from jaxtune.recipes.schema import plain
from jaxtune.recipes.schema_keys import BY_PATH

MOST_COMPILED = 3


def fit(
    config: Mapping[str, Any],
    topology: str | None = None,
    *,
    devices: str | None = None,
    price: str | float | None = None,
    quick: bool = False,
) -> dict[str, Any]:
    """Returns the plan of the fastest settings that fit, with the lines that make them.

    Micro-batches, remat, mesh and, for methods that leave weights frozen, quantisation are
    compared by estimate. With a topology the best are compiled until one fits.

    Args:
        config, topology, devices, price, quick: as in `recipes.plan.plan`.

    Returns:
        The object of `plan`, and `"fit": {"searched", "fitting", "lines"}`.

    Raises:
        RequestError: nothing fits, or what `plan` raises.
    """
    started = draft(config, topology, devices=devices, price=price)
    found = trials(started)
    usable = chips.usable_bytes(started.target.chip)
    order = search.ranked(found, usable)
    if not order:
        least = min(found, key=lambda t: t.total_bytes)
        raise RequestError(
            f"none of {len(found)} settings fits {usable / 2**30:.1f} GiB a device; the smallest, "
            f"{' '.join(search.lines(least.setting))}, needs {least.total_bytes / 2**30:.1f} GiB",
            key="--fit",
        )
    result: dict[str, Any] = {}
    for trial in order[: MOST_COMPILED if topology else 1]:
        chosen = with_setting(config, trial.setting)
        result = report(draft(chosen, topology, devices=devices, price=price), quick)
        result["fit"] = {
            "searched": len(found),
            "fitting": len(order),
            "lines": search.lines(trial.setting),
        }
        if result["fits"]:
            break
    return result


def trials(started: Draft) -> list[Trial]:
    """Returns a Trial of each setting of a Draft's config on its devices."""
    program, target = started.program, started.target
    model = program.parts.config
    kinds = quantisations(started)

    @functools.cache
    def on_mesh(data: int, fsdp: int, tensor: int) -> build.Plan:
        sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
        mesh = abstract_mesh(sizes, target.mesh.size)
        parts = plan_parts(model, program.parts.method, mesh)
        placed = build.Model(program.base, parts, program.attention)
        return build.connect(started.config, mesh, placed, started.length.data)

    found = []
    rows, count = started.config.batch_size, target.mesh.size
    for setting in search.settings(count, rows, model.num_kv_heads, kinds):
        placed = on_mesh(setting.data, setting.fsdp, setting.tensor)
        parts = dataclasses.replace(
            placed.parts, config=dataclasses.replace(model, remat=setting.remat)
        )
        place = dataclasses.replace(target, mesh=placed.mesh, compiled=False)
        one = dataclasses.replace(
            started, target=place, program=dataclasses.replace(placed, parts=parts)
        )
        sizes, estimate = analyse(one, grad_accum=setting.grad_accum)
        saved = quantisation_saves(one, setting)
        found.append(Trial(setting, sizes["total"] - saved, estimate.seconds))
    return found


def quantisations(started: Draft) -> tuple[str, ...]:
    """Returns the values of `model.quantize` to compare: those that a config may have."""
    asked = started.config.model.quantize
    if asked != "none" or started.config.peft.method == "full":
        return (asked,)
    return tuple(name for name in BY_PATH["model.quantize"].choices)


def quantisation_saves(one: Draft, setting: Setting) -> int:
    """Returns the bytes of a device that quantising the blocks' frozen kernels saves."""
    if setting.quantize == one.config.model.quantize:
        return 0
    parts = one.program.parts
    kinds, places = flatten(parts.labels), flatten(parts.shardings)
    saved = 0.0
    for path, leaf in flatten(parts.shapes).items():
        kernel = path.startswith("blocks/") and path.endswith("kernel") and "/router/" not in path
        if kernel and kinds[path] == FROZEN:
            elements = 1
            for size in places[path].shard_shape(leaf.shape):
                elements *= size
            saved += elements * (leaf.dtype.itemsize - search.QUANTIZED[setting.quantize])
    return int(saved)


def with_setting(config: Mapping[str, Any], setting: Setting) -> dict[str, Any]:
    """Returns a config with a setting."""
    raw = for_planning(plain(config))
    axes = ("data", "fsdp", "tensor")
    mesh = dict(raw.get("mesh") or {}) | {axis: getattr(setting, axis) for axis in axes}
    model = dict(raw["model"]) | {"remat": setting.remat, "quantize": setting.quantize}
    return raw | {"mesh": mesh, "model": model, "grad_accum": setting.grad_accum}
