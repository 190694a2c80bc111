"""The splash kernel against the dense form: interpreted here, and compiled for TPU."""

from __future__ import annotations

import functools

import jax
import pytest

from jaxtune.models.attention import attend
from jaxtune.models.attention_splash import attend_splash
from jaxtune.parallel.mesh import make_mesh
from tests.models.attention_cases import (
    LEFT,
    PACKED,
    RIGHT,
    WHOLE,
    assert_equal,
    case,
    value_and_gradients,
)

pytestmark = pytest.mark.slow
interpreted = functools.partial(attend_splash, interpret=True)


@pytest.mark.parametrize(
    ("window", "extras", "groups"),
    [
        (None, (), 2),
        (40, ("scale", "softcap"), 1),
        (1, ("sinks",), 4),
        (300, ("softcap", "sinks"), 2),
    ],
)
def test_equals_the_dense_form(window, extras, groups):
    made = case(window=window, extras=extras, groups=groups)
    assert_equal(value_and_gradients(interpreted, made), value_and_gradients(attend, made))


@pytest.mark.parametrize(
    ("sizes", "groups"),
    [
        ({"data": 2, "fsdp": 2, "tensor": 2}, 2),
        ({"tensor": 4}, 2),  # a key head is repeated for each pair of devices
        ({"fsdp": 2, "tensor": 3}, 2),  # 3 does not divide the heads: they stay whole
    ],
)
def test_on_a_mesh_equals_the_dense_form_on_one_device(sizes, groups):
    made = case((PACKED, LEFT, RIGHT, WHOLE), 128, window=40, extras=("sinks",), groups=groups)
    expected = value_and_gradients(attend, made)
    with jax.set_mesh(make_mesh(sizes)):
        found = value_and_gradients(interpreted, made)
    assert_equal(found, expected)
