"""`jaxtune plan --fit`: the fastest settings of a config that fit the devices."""

from __future__ import annotations

import dataclasses
import functools
import math
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
from jaxtune.recipes.plans.draft import Draft, draft
from jaxtune.recipes.plans.length import for_planning
from jaxtune.recipes.plans.report import analyse, report
from jaxtune.recipes.retention.replay_mixing import replayed_rows
from jaxtune.recipes.schema.keys import BY_PATH
from jaxtune.recipes.schema.resolve import plain

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
        config, topology, devices, price, quick: as in `recipes.plans.plan.plan`.

    Returns:
        The object of `plan`, and `"fit": {"searched", "fitting", "lines"}`.

    Raises:
        RequestError: nothing fits, or what `plan` raises.
    """
    started = draft(starting(config), topology, devices=devices, price=price)
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


def starting(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a config on a mesh that any number of rows fits: the search chooses another."""
    raw = for_planning(plain(config))
    if (raw.get("model") or {}).get("attention") == "ring":
        return raw  # needs a mesh that spreads rows, which is the config's own
    alone = search.Setting(1, 1, -1, 1, "none")
    return raw | {"mesh": dict(raw.get("mesh") or {}) | alone.mesh, "grad_accum": 1}


def trials(started: Draft) -> list[Trial]:
    """Returns a Trial of each setting of a Draft's config on its devices."""
    program, target, config = started.program, started.target, started.config
    model, count = program.parts.config, target.mesh.size
    asked = dataclasses.replace(model, attention=config.model.attention)
    base = dataclasses.replace(program.base, config=asked)

    @functools.cache
    def on_mesh(setting: Setting) -> build.Plan:
        mesh = abstract_mesh(setting.mesh, count)
        method = program.parts.method
        attention = build.choose_attention(config, mesh, target.platform, base, method)
        chosen = dataclasses.replace(model, attention=attention.name)
        placed = build.Model(program.base, plan_parts(chosen, method, mesh), attention)
        return build.connect(config, mesh, placed, started.length.data)

    found = []
    experts = 0 if model.experts is None else model.experts.count
    for setting in search.settings(
        count,
        math.gcd(config.batch_size, replayed_rows(config)),  # rows that any setting divides
        model.num_kv_heads,
        quantisations(config),
        row_parts(config, count),
        search.expert_parts(experts, count),
    ):
        # What else a setting holds changes nothing of what lies where.
        mesh_alone = dataclasses.replace(setting, grad_accum=1, remat="none", quantize="none")
        placed = on_mesh(mesh_alone)
        parts = dataclasses.replace(
            placed.parts, config=dataclasses.replace(placed.parts.config, remat=setting.remat)
        )
        place = dataclasses.replace(target, mesh=placed.mesh, compiled=False)
        one = dataclasses.replace(
            started, target=place, program=dataclasses.replace(placed, parts=parts)
        )
        sizes, estimate = analyse(one, grad_accum=setting.grad_accum)
        saved = quantisation_saves(one, setting)
        found.append(Trial(setting, sizes["total"] - saved, estimate.seconds))
    return found


def quantisations(config: Any) -> tuple[str, ...]:
    """Returns the values of `model.quantize` to compare: those that a resolved config may have."""
    asked = config.model.quantize
    whole = config.peft.method == "full" or config.peft.get("variant") == "pissa"
    if asked != "none" or whole:
        return (asked,)
    return tuple(name for name in BY_PATH["model.quantize"].choices)


def row_parts(config: Any, devices: int) -> list[int]:
    """Returns the sizes of `mesh.sequence` to compare; beyond 1 attention is a ring."""
    attention = config.model.attention
    if attention not in ("auto", "ring"):
        return [1]
    found = search.row_parts(config.data.seq_len, devices)
    return found if attention == "auto" else [n for n in found if n > 1]


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
    mesh = dict(raw.get("mesh") or {}) | setting.mesh
    model = dict(raw["model"]) | {"remat": setting.remat, "quantize": setting.quantize}
    return raw | {"mesh": mesh, "model": model, "grad_accum": setting.grad_accum}
