"""TPU slices that are not there: devices of a topology, to compile for."""

from __future__ import annotations

import importlib.util
import os
import re
from typing import Any

from jaxtune.core.errors import RequestError
from jaxtune.planning import chips

# libtpu would otherwise ask the cloud's metadata server which machine this is, and refuse to be
# loaded by two processes of a machine, which matters only where there is a TPU.
ENVIRONMENT = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
}
INSTALL = 'pip install "jax[tpu]"'


def parse(text: str) -> tuple[chips.Chip, str]:
    """Returns (chip, libtpu's name) of a topology such as `v5e:4x4`.

    Raises:
        RequestError: with what would be valid.
    """
    match = re.fullmatch(r"([\w ]+):(\d+(?:x\d+){1,2})", text.strip())
    if match is None:
        raise RequestError(
            f"expected CHIP:SIZE, such as v5e:4x4 or v5p:2x2x4; got {text!r}", key="--topology"
        )
    chip = chips.find(match[1], "--topology")
    if chips.platform(chip) != "tpu":
        raise RequestError(
            f"{chip.name} has no topology to compile for; use --devices=COUNTx{chip.name}",
            key="--topology",
        )
    return chip, f"{chip.name}:{match[2]}"


def prepare() -> None:
    """Makes libtpu a compiler: to be called before jax is imported, where that can be had.

    Raises:
        RequestError: libtpu is not installed.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise RequestError(
            f"compiling for a TPU needs libtpu, which is not installed: {INSTALL}",
            key="--topology",
        )
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")


def devices(text: str) -> list[Any]:
    """Returns the devices of a topology, as JAX sees them.

    Raises:
        RequestError: libtpu is not installed, does not fit jax, or knows no such topology.
    """
    _, name = parse(text)
    prepare()
    from jax.experimental import topologies

    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=name).devices)
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise RequestError(f"libtpu does not know {name!r}: {reason}", key="--topology") from None
