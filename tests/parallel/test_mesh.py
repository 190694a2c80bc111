"""Meshes, and batches on them."""

import dataclasses

import jax
import numpy as np
import pytest

from jaxtune.core.errors import RequestError
from jaxtune.parallel.batches import check_batch, global_batch
from jaxtune.parallel.mesh import AXES, batch_shards, make_mesh, slices_of


def sizes(mesh) -> dict[str, int]:
    return {axis: size for axis, size in mesh.shape.items() if size != 1}


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({"fsdp": -1}, {"fsdp": 8}),
        ({"data": 2, "fsdp": -1}, {"data": 2, "fsdp": 4}),
        ({"data": 2, "fsdp": 2, "tensor": 2}, {"data": 2, "fsdp": 2, "tensor": 2}),
        ({"tensor": 8}, {"tensor": 8}),
        ({"fsdp": 2, "tensor": 3}, {"fsdp": 2, "tensor": 3}),
        ({}, {}),
    ],
)
def test_one_axis_takes_what_is_left_and_a_mesh_may_be_smaller(asked, expected):
    mesh = make_mesh(asked)
    assert sizes(mesh) == expected
    assert mesh.axis_names == AXES
    count = int(np.prod(list(expected.values()), dtype=int))
    assert [d.id for d in mesh.devices.flat] == [d.id for d in jax.devices()[:count]]
    assert batch_shards(mesh) == expected.get("data", 1) * expected.get("fsdp", 1)


@pytest.mark.parametrize("asked", [{"data": 3, "fsdp": -1}, {"data": 16}, {"data": 4, "tensor": 4}])
def test_a_mesh_that_the_devices_do_not_fill_is_refused(asked):
    with pytest.raises(RequestError, match=r"mesh: .* does not fit 8 devices"):
        make_mesh(asked)


@pytest.mark.parametrize("asked", [{"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_a_batch_lies_on_the_mesh_row_by_row(asked):
    mesh = make_mesh(asked)
    rows = np.arange(16 * 3, dtype=np.int32).reshape(16, 3)
    placed = global_batch({"input_ids": rows, "loss_mask": rows.astype(np.float32)}, mesh)
    assert np.array_equal(placed["input_ids"], rows)
    assert placed["loss_mask"].dtype == np.float32
    share = 16 // batch_shards(mesh)
    for shard in placed["input_ids"].addressable_shards:
        assert shard.data.shape == (share, 3)
        assert np.array_equal(shard.data, rows[shard.index])


@pytest.mark.parametrize(("batch", "accum", "fits"), [(16, 2, True), (8, 1, True), (12, 1, False)])
def test_micro_batches_must_spread_over_the_shards(batch, accum, fits):
    mesh = make_mesh({"fsdp": 8})
    if fits:
        check_batch(batch, accum, mesh)
        return
    with pytest.raises(RequestError, match="batch_size: 12 rows do not split into 1 micro-batches"):
        check_batch(batch, accum, mesh)


def test_more_micro_batches_than_rows_a_shard_are_refused():
    with pytest.raises(RequestError, match="use a multiple of 16"):
        check_batch(8, 2, make_mesh({"fsdp": 8}))


def test_rows_are_spread_over_the_experts_devices_too():
    assert batch_shards(make_mesh({"data": 2, "fsdp": 1, "expert": 4})) == 8


@dataclasses.dataclass(frozen=True)
class Device:
    """As a TPU's devices are, of several slices or of one."""

    id: int
    slice_index: int | None = None


def numbers(groups):
    return [[device.id for device in group] for group in groups]


def test_devices_say_which_slice_they_are_in():
    mixed = [Device(i, slice_index=i % 2) for i in range(6)]
    assert numbers(slices_of(mixed, -1)) == numbers(slices_of(mixed, 2)) == [[0, 2, 4], [1, 3, 5]]
    with pytest.raises(RequestError, match=r"mesh\.slices: the devices are in 2 slices"):
        slices_of(mixed, 1)
    with pytest.raises(RequestError, match="slices of 3, 2 devices are not alike"):
        slices_of(mixed[:5], -1)


def test_other_devices_are_cut_into_as_many_slices_as_are_asked_for():
    plain = [Device(i) for i in range(6)]
    assert numbers(slices_of(plain, -1)) == [list(range(6))]
    assert numbers(slices_of(plain, 3)) == [[0, 1], [2, 3], [4, 5]]
    one = [Device(i, slice_index=0) for i in range(6)]
    assert numbers(slices_of(one, -1)) == [list(range(6))]
    with pytest.raises(RequestError, match="6 devices cannot be cut into 4 slices"):
        slices_of(plain, 4)


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({"fsdp": -1, "slices": 2}, {"data": 2, "fsdp": 4}),
        ({"data": 2, "fsdp": -1, "slices": 2}, {"data": 4, "fsdp": 2}),
        ({"fsdp": 2, "tensor": 2, "slices": 2, "slice_axis": "fsdp"}, {"fsdp": 4, "tensor": 2}),
    ],
)
def test_sizes_are_those_of_a_slice_and_slices_are_outermost(asked, expected):
    mesh = make_mesh(asked)
    assert sizes(mesh) == expected
    axis = AXES.index(asked.get("slice_axis", "data"))
    halves = np.split(mesh.devices, 2, axis=axis)
    assert [sorted(d.id for d in half.flat) for half in halves] == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_a_mesh_that_does_not_fill_each_slice_is_refused():
    with pytest.raises(RequestError, match="data=4 × tensor=2 does not fit 4 devices in each of 2"):
        make_mesh({"data": 4, "tensor": 2, "slices": 2})
