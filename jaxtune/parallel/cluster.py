"""Where this process stands among several: given, or as a cluster's environment says."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from jaxtune.core.errors import RequestError

FLAG = "--distributed"
LIMIT_VARIABLE = "JAXTUNE_HOST_TIMEOUT"
# Hosts of a slice may start minutes apart; one that is silent for so long is gone.
DEFAULT_LIMIT = 300.0


@dataclass(frozen=True)
class Place:
    """Which process this is.

    Attributes:
        host, port: of process 0, where JAX's service listens.
        count: processes of the run.
        index: of this one.
        devices: ids of the local devices that are its own; None: all.
    """

    host: str
    port: int
    count: int
    index: int
    devices: tuple[int, ...] | None = None


def parse(text: str) -> Place | str:
    """Returns the Place of HOST:PORT,COUNT,INDEX, or "auto" or "none".

    Raises:
        RequestError: none of these.
    """
    if text in ("auto", "none"):
        return text
    match = re.fullmatch(r"(\[[^\]]+\]|[^\s:,]+):(\d+),(\d+),(\d+)", text)
    if match is None:
        raise RequestError(f"auto, none or HOST:PORT,COUNT,INDEX, not {text!r}", key=FLAG)
    host, port, count, index = match[1], *map(int, match.groups()[1:])
    if not 0 < port < 65536:
        raise RequestError(f"port {port} is not in 1..65535", key=FLAG)
    if count < 1 or index >= count:
        raise RequestError(f"index {index} is not in 0..{count - 1}", key=FLAG)
    return Place(host, port, count, index)


def time_limit() -> float:
    """Returns the seconds after which a silent process is gone."""
    text = os.environ.get(LIMIT_VARIABLE, "")
    try:
        limit = float(text or DEFAULT_LIMIT)
    except ValueError:
        limit = 0.0
    if not 1 <= limit <= 86400:
        raise RequestError(f"expected seconds from 1 to 86400, not {text!r}", key=LIMIT_VARIABLE)
    return limit


def find(limit: float) -> Place | None:
    """Returns the place that a cluster's environment gives this process, or None outside of one.

    The environments are those that `jax.distributed` knows: Cloud TPU VMs, GKE, Kubernetes jobs,
    SLURM and Open MPI.

    Raises:
        RequestError: there is a cluster, but it does not say enough.
    """
    from jax._src.clusters import ClusterEnv

    try:
        address, count, index, devices = ClusterEnv.auto_detect_unset_distributed_params(
            os.environ.get("JAX_COORDINATOR_ADDRESS"), None, None, None, None, int(limit)
        )
    except Exception as error:  # each environment fails in its own ways
        raise RequestError(
            f"a cluster was found, but not this process's place in it ({type(error).__name__}: "
            f"{error}); give HOST:PORT,COUNT,INDEX, or none",
            key=FLAG,
        ) from error
    if address is None or count is None or count < 2:
        return None
    host, _, port = address.rpartition(":")
    if devices is None or "JAX_LOCAL_DEVICE_IDS" in os.environ:  # which JAX reads itself
        return Place(host, int(port), count, int(index))
    return Place(host, int(port), count, int(index), tuple(devices))
