"""`jaxtune plan`: what a config will need and cost, before it runs; no weight is read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxtune.recipes.plans.draft import draft
from jaxtune.recipes.plans.report import report


def plan(
    config: Mapping[str, Any],
    topology: str | None = None,
    *,
    devices: str | None = None,
    price: str | float | None = None,
    quick: bool = False,
) -> dict[str, Any]:
    """Returns what a run will need: parameters, memory, operations, time and money.

    Args:
        config: a ConfigDict or mapping; see `docs/config.md`. Its data need not be here.
        topology: a TPU slice, such as `v5e:4x4`; the real step is compiled for it.
        devices: chips to estimate for, such as `8xH100`; by default those of this machine.
        price: US dollars an hour of one device, or a JSON or YAML file {chip: price}.
        quick: compile with the least effort, several times faster; it is not the program of a run,
            and its memory may be a quarter off.

    Returns:
        The object that `docs/plan.md` describes; JSON can hold it.

    Raises:
        RequestError: the config, the devices or the price cannot be honoured.
    """
    return report(draft(config, topology, devices=devices, price=price), quick)
