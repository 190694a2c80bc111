"""Least times, with figures that can be checked in the head."""

import pytest

from jaxtune.parallel.mesh import abstract_mesh
from jaxtune.planning import roofline
from jaxtune.planning.chips import Chip

CHIP = Chip("slow", 100.0, 1000, 10.0, 5.0, 1.0, 4, None, "", None)
SIZES = roofline.Sizes(
    flops=8000.0,
    weights=400.0,
    trained=40.0,
    updated=50.0,
    activations=30.0,
    rows=20.0,
    layers=2,
    passes=3,
    grad_accum=1,
)


def traffic(**sizes):
    count = 1
    for size in sizes.values():
        count *= size
    mesh = abstract_mesh(sizes, count)
    return roofline.traffic(SIZES, mesh), mesh


def test_one_device_sends_nothing():
    work, mesh = traffic(fsdp=1)
    assert work.flops == 8000 and not any(work.sent.values())
    # Weights once a pass, activations three times, what is updated read and written.
    assert work.hbm_bytes == 3 * 400 + 3 * 30 + 2 * 50
    found = roofline.estimate(work, CHIP, mesh)
    assert found.seconds == {"compute": 80.0, "memory bandwidth": 139.0}
    assert (found.binding, found.step_seconds) == ("memory bandwidth", 139.0)


def test_fsdp_gathers_in_every_pass_and_scatters_gradients():
    work, mesh = traffic(fsdp=4)
    assert work.sent["fsdp"] == pytest.approx(3 * 300 + 30)
    assert work.flops == 2000
    found = roofline.estimate(work, CHIP, mesh)
    assert found.seconds["interconnect"] == pytest.approx(930 / 5)
    assert "network" not in found.seconds


def test_data_sums_gradients_and_tensor_sums_states():
    work, _ = traffic(data=4)
    assert work.sent["data"] == pytest.approx(2 * 30) and work.sent["fsdp"] == 0
    work, _ = traffic(tensor=2)
    # Twice a layer and pass, there and back: 20 bytes · 2 layers · 3 passes · 2 · 2 · ½.
    assert work.sent["tensor"] == pytest.approx(20 * 2 * 3 * 2)


def test_an_axis_beyond_the_fast_links_goes_over_the_network():
    work, mesh = traffic(data=2, fsdp=4)
    found = roofline.estimate(work, CHIP, mesh)
    assert found.seconds["network"] == pytest.approx(work.sent["data"] / 1.0)
    assert found.seconds["interconnect"] == pytest.approx(work.sent["fsdp"] / 5.0)


@pytest.mark.parametrize(
    ("seconds", "good"), [(None, False), (-20.0, False), (0.01, False), (1.2, True), (99.0, False)]
)
def test_the_compilers_estimate_is_taken_where_it_can_be_true(seconds, good):
    assert roofline.plausible(seconds, 1.0) is good
