"""Ring attention against the dense form, on one device and on eight."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import pytest

from jaxtune.models import attention_blocks
from jaxtune.models.attention import Span, attend
from jaxtune.models.attention_blocks import Rule, in_blocks, may_see, seen_by
from jaxtune.models.attention_ring import attend_ring
from jaxtune.parallel.mesh import make_mesh
from jaxtune.parallel.sequence import zigzag
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
ALL = ("scale", "softcap", "sinks", "prefix")


@pytest.mark.parametrize(
    ("window", "extras", "groups"),
    [(None, (), 2), (7, ALL, 1), (1, ("sinks",), 4), (None, ("prefix",), 2)],
)
def test_on_one_device_equals_the_dense_form(window, extras, groups):
    made = case(tokens=48, window=window, extras=extras, groups=groups)
    assert_equal(value_and_gradients(attend_ring, made), value_and_gradients(attend, made))


@pytest.mark.parametrize(
    ("sizes", "window", "extras", "groups"),
    [
        ({"sequence": 8}, None, (), 2),
        ({"sequence": 4, "tensor": 2}, 11, ALL, 2),
        ({"sequence": 2, "fsdp": 2, "data": 2}, None, ("sinks", "prefix"), 2),
        ({"sequence": 2, "tensor": 4}, 11, ("prefix",), 2),  # key heads are repeated
    ],
)
def test_on_a_ring_equals_the_dense_form_on_one_device(sizes, window, extras, groups):
    made = case((PACKED, LEFT, RIGHT, WHOLE), 48, window=window, extras=extras, groups=groups)
    expected = value_and_gradients(attend, made)
    with jax.set_mesh(make_mesh(sizes)):
        found = value_and_gradients(attend_ring, made)
    assert_equal(found, expected)


def test_blocks_are_skipped_only_where_nothing_is_visible():
    """Against the mask of every pair of blocks, for rows of all layouts in zigzag order."""
    tokens, size = 48, 6
    order = zigzag(tokens, 4)
    for window, rows in itertools.product((None, 1, 9), ((PACKED,), (LEFT,), (RIGHT,), (WHOLE,))):
        span = Span(*(a[:, order] for a in case(rows, tokens).span))
        rule = Rule(window, 1.0, None, None, 1)
        blocks = in_blocks(span, size)
        skipped = needless = 0
        for i, j in itertools.product(range(tokens // size), repeat=2):
            queries, keys = (jax.tree.map(lambda x, n=n: x[n], blocks) for n in (i, j))
            seen, may = (
                bool(jnp.any(seen_by(rule, queries, keys))),
                bool(may_see(rule, queries, keys)),
            )
            assert may or not seen
            skipped += not may
            needless += may and not seen
        # of a whole row, exactly what the causal order and the window rule out
        assert skipped > 0 and (rows != (WHOLE,) or needless == 0)


def test_a_block_of_scores_has_a_bound(monkeypatch):
    assert attention_blocks.block_size(1, 4096, 32) ** 2 * 4 * 32 <= attention_blocks.BLOCK_BYTES
    assert attention_blocks.block_size(2, 48, 4) == 24
    made = case(tokens=48, window=20, extras=ALL)
    expected = value_and_gradients(attend, made)
    monkeypatch.setattr(attention_blocks, "BLOCK_BYTES", 4 * 2 * 4 * 5 * 5)
    assert attention_blocks.block_size(2, 48, 4) == 4
    assert_equal(value_and_gradients(attend_ring, made), expected)


def test_bfloat16_stays_bfloat16():
    made = case(tokens=48, extras=ALL, dtype=jnp.bfloat16)
    found, expected = value_and_gradients(attend_ring, made), value_and_gradients(attend, made)
    assert_equal(found, expected, tolerance=2e-2)
