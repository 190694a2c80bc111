"""Device meshes, of one slice of connected devices or of several."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh

from jaxtune.core.errors import RequestError

AXES = ("data", "fsdp", "tensor", "sequence", "expert")
# Rows of a batch are spread over these. `expert` is one of them: outside the experts its devices
# would otherwise all compute the same rows.
BATCH_AXES = ("data", "fsdp", "expert")
HEAD_AXIS, SEQUENCE_AXIS = "tensor", "sequence"


def make_mesh(shape: Mapping[str, Any], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Returns a mesh with the axes `AXES`; one axis of size -1 takes the devices that are left.

    Sizes are those of one slice. With several slices the axis `slice_axis` is as many times as
    long, slices outermost, so that the slow network between slices carries that axis' traffic
    alone; inside a slice devices are in the order of their physical neighbours. Without a -1 the
    mesh of one slice may be smaller than the machine: it takes the first devices.

    Args:
        shape: {axis: size}, an absent axis has size 1; "slices", -1 or absent for what the devices
            say; "slice_axis", "data" (default) or "fsdp".
        devices: all devices by default.

    Raises:
        RequestError: the sizes do not fit the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    slices = slices_of(devices, shape.get("slices", -1))
    sizes = axis_sizes(shape, len(slices[0]), len(slices))
    if len(slices) == jax.process_count() == 1:
        slices = [devices[: math.prod(sizes)]]
    if math.prod(sizes) != len(slices[0]):
        raise _misfit(sizes, len(slices[0]), len(slices))
    # Of a v5p or v4 torus an axis of the mesh may be a part of a physical one.
    inner = [
        mesh_utils.create_device_mesh(sizes, group, allow_split_physical_axes=True)
        for group in slices
    ]
    outer = np.concatenate(inner, axis=AXES.index(shape.get("slice_axis", "data")))
    return Mesh(outer, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def slices_of(devices: Sequence[jax.Device], count: int) -> list[list[jax.Device]]:
    """Returns the devices of each slice, all as many.

    Args:
        devices: TPU devices say which slice they are in; others, such as the hosts of a GPU
            cluster, are cut into equal runs in their order, which is that of the processes.
        count: slices, or -1 for what the devices say, one if they say nothing.

    Raises:
        RequestError: the devices are in another number of slices, or cannot be cut so.
    """
    told = [getattr(device, "slice_index", None) for device in devices]
    found = sorted({index for index in told if index is not None})
    if len(found) > 1:
        groups = [[d for d, i in zip(devices, told, strict=True) if i == s] for s in found]
        if count not in (-1, len(found)):
            raise RequestError(f"the devices are in {len(found)} slices", key="mesh.slices")
        if len({len(group) for group in groups}) > 1:
            sizes = ", ".join(str(len(group)) for group in groups)
            raise RequestError(f"slices of {sizes} devices are not alike", key="mesh.slices")
        return groups
    count = max(count, 1)
    if len(devices) % count:
        raise RequestError(
            f"{len(devices)} devices cannot be cut into {count} slices", key="mesh.slices"
        )
    each = len(devices) // count
    return [list(devices[start : start + each]) for start in range(0, len(devices), each)]


def abstract_mesh(shape: Mapping[str, Any], count: int) -> AbstractMesh:
    """Returns the mesh that `make_mesh` makes of `count` devices, without the devices.

    They are in as many slices as `shape` says, in one if it does not.
    """
    slices = max(shape.get("slices", -1), 1)
    if count % slices:
        raise RequestError(f"{count} devices cannot be cut into {slices} slices", key="mesh.slices")
    sizes = list(axis_sizes(shape, count // slices, slices))
    sizes[AXES.index(shape.get("slice_axis", "data"))] *= slices
    return AbstractMesh(tuple(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def axis_sizes(shape: Mapping[str, Any], count: int, slices: int = 1) -> tuple[int, ...]:
    """Returns the size of each of `AXES` on `count` devices, in each of so many slices.

    Their product is not above `count`.

    Raises:
        RequestError: the sizes do not fit the number of devices.
    """
    sizes = [shape.get(axis, 1) for axis in AXES]
    known = math.prod(size for size in sizes if size != -1)
    if -1 in sizes and count % known == 0:
        sizes[sizes.index(-1)] = count // known
    if -1 in sizes or math.prod(sizes) > count:
        raise _misfit(sizes, count, slices)
    return tuple(sizes)


def _misfit(sizes: Sequence[int], count: int, slices: int = 1) -> RequestError:
    asked = " × ".join(f"{a}={s}" for a, s in zip(AXES, sizes, strict=True) if s != 1) or "1"
    where = f" in each of {slices} slices" if slices > 1 else ""
    return RequestError(f"{asked} does not fit {count} devices{where}", key="mesh")


def batch_shards(mesh: Mesh | AbstractMesh) -> int:
    """Returns over how many shards the rows of a batch are spread."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)
