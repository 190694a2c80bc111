"""`train --budget`: how long a run may train, from hours or from money."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import jax

from jaxtune.core.errors import RequestError
from jaxtune.planning import chips

_SECONDS = {"s": 1, "sec": 1, "m": 60, "min": 60, "h": 3600, "hour": 3600, "hours": 3600}
_FORM = re.compile(r"(?:(\$)\s*)?(\d+(?:\.\d*)?|\.\d+)\s*([A-Za-z]*)")


def seconds_of(text: str, price: str | float | None = None) -> float:
    """Returns the seconds of training that a budget buys on the devices of this machine.

    Args:
        text: a time, such as `3h`, `90min` or `30s`, or US dollars, such as `20USD`.
        price: US dollars an hour of one device, or a file; by default the chip's list price.

    Raises:
        RequestError: it is neither, or no price of the devices is known.
    """
    match = _FORM.fullmatch(text.strip())
    unit = match[3].lower() if match else ""
    dollars = match is not None and (unit == "usd" or (match[1] and not unit))
    if match is None or not (dollars or (unit in _SECONDS and not match[1])):
        raise RequestError(
            f"expected a time or money, such as 3h, 90min or 20USD; got {text!r}", key="--budget"
        )
    amount = float(match[2])
    if not dollars:
        return amount * _SECONDS[unit]
    devices = jax.devices()
    chip = chip_of(devices, price)
    if not chip.price:
        raise RequestError(
            f"no price of {chip.name} is known: give --price=USD an hour of one device, or a time",
            key="--budget",
        )
    return amount / (chip.price * len(devices)) * 3600


def chip_of(devices: Sequence[jax.Device], price: str | float | None) -> chips.Chip:
    """Returns what is known of the devices, at the given price or the chip's list price."""
    kind = devices[0].device_kind
    return chips.with_price(chips.of_device_kind(kind) or chips.unknown(kind), price)


def spent(
    seconds: float, devices: Sequence[jax.Device], price: str | float | None
) -> dict[str, Any]:
    """Returns what training has cost: `device`, `device_hours`, `usd` and what it is made of.

    `usd`, `usd_per_device_hour` and `price_source` are None where no price of the devices is known.

    Args:
        seconds: of training.
        devices: that the run holds, whether they are busy or not.
        price: US dollars an hour of one device, or a file; by default the chip's list price.
    """
    chip, hours = chip_of(devices, price), seconds / 3600 * len(devices)
    known = bool(chip.price)
    return {
        "device": devices[0].device_kind,
        "device_hours": hours,
        "usd": hours * chip.price if known else None,
        "usd_per_device_hour": chip.price if known else None,
        "price_source": chip.price_source if known else None,
    }
