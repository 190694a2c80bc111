"""A config on the devices that it is planned for."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh

from jaxtune.core.errors import RequestError
from jaxtune.parallel.mesh import abstract_mesh, make_mesh
from jaxtune.planning import chips, machine, topology
from jaxtune.recipes import build
from jaxtune.recipes.plans.length import Length, for_planning, length_of
from jaxtune.recipes.schema.resolve import Resolved, resolve


@dataclasses.dataclass(frozen=True)
class Target:
    """What a run is planned for.

    Attributes:
        mesh: of devices, or abstract where there are none to see.
        chip: of each device.
        platform: "tpu", "gpu" or "cpu".
        text: how it was asked for.
        compiled: whether the step is compiled for it.
    """

    mesh: Mesh | AbstractMesh
    chip: chips.Chip
    platform: str
    text: str
    compiled: bool


@dataclasses.dataclass(frozen=True)
class Draft:
    """A config on a target, before anything is said about it."""

    config: Resolved
    target: Target
    length: Length
    program: build.Plan


def draft(
    config: Mapping[str, Any],
    topology_: str | None = None,
    *,
    devices: str | None = None,
    price: str | float | None = None,
) -> Draft:
    """Returns the Draft of a config; see `plan`."""
    config = resolve(for_planning(config))
    if topology_ is not None and devices is not None:
        raise RequestError("--topology says which devices: give one of the two", key="--devices")
    target = find_target(config, topology_, devices, price)
    model = build.assemble(config, target.mesh, target.platform)
    length = length_of(config, model.base, model.parts.method)
    program = build.connect(config, target.mesh, model, length.data)
    return Draft(config, target, length, program)


def find_target(
    config: Any, topology_: str | None, devices: str | None, price: str | float | None
) -> Target:
    """Returns the Target of the command line's flags."""
    if topology_ is not None:
        chip, name = topology.parse(topology_)
        mesh = make_mesh(config.mesh, topology.devices(topology_))
        return Target(mesh, chips.with_price(chip, price), "tpu", name, True)
    if devices is not None:
        count, chip = chips.parse_devices(devices)
        platform, text = chips.platform(chip), f"{count}x{chip.name}"
    else:
        count, chip = machine.this_machine()
        platform, text = jax.default_backend(), f"{count}x{chip.name} (here)"
    mesh = abstract_mesh(config.mesh, count)
    return Target(mesh, chips.with_price(chip, price), platform, text, False)
