"""How much memory a process has used at most."""

from __future__ import annotations

import resource
import sys

import jax

# getrusage counts kilobytes, but on macOS bytes.
_UNIT = 1 if sys.platform == "darwin" else 1024


def peak_memory() -> dict[str, int | None]:
    """Returns the most bytes that were in use since the process began.

    `device_bytes` is that of the fullest device of this process, None where the platform does not
    count (CPUs); `host_bytes` the largest resident size of the process.
    """
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    known = [found["peak_bytes_in_use"] for found in stats if "peak_bytes_in_use" in found]
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _UNIT
    return {"device_bytes": max(known, default=None), "host_bytes": host}
