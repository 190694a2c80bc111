"""Attention over rows of every layout, and a comparison of back ends with the dense form."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.models.attention import Span, Where, attend, visible

# Lengths of a row's segments as shares of the row; a negative one is padding.
PACKED = (0.3, 0.05, 0.4, -0.25)
LEFT = (-0.3, 0.7)
RIGHT = (0.8, -0.2)
WHOLE = (1.0,)


def span_of(rows: Sequence[Sequence[float]], tokens: int) -> Span:
    """The segments and positions of rows [B, tokens]."""
    ids, positions = np.zeros((2, len(rows), tokens), np.int32)
    for row, shares in enumerate(rows):
        at, segment = 0, 0
        for share in shares:
            count = min(round(abs(share) * tokens), tokens - at)
            if share > 0:
                segment += 1
                ids[row, at : at + count] = segment
                positions[row, at : at + count] = np.arange(count)
            at += count
    return Span(jnp.asarray(ids), jnp.asarray(positions))


@dataclasses.dataclass(frozen=True)
class Case:
    """The arguments of an attention; `arrays` are those that it is differentiated by."""

    arrays: dict[str, Any]
    span: Span
    window: int | None
    settings: dict[str, Any]
    cotangent: jax.Array


def case(
    rows: Sequence[Sequence[float]] = (PACKED, LEFT),
    tokens: int = 256,
    heads: int = 4,
    groups: int = 2,
    size: int = 16,
    window: int | None = None,
    extras: Sequence[str] = (),
    dtype: Any = jnp.float32,
) -> Case:
    """A case of random numbers; `extras` of "scale", "softcap", "sinks" and "prefix"."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape, np.float32), dtype)

    span = span_of(rows, tokens)
    arrays = {
        "query": normal(len(rows), tokens, heads, size),
        "key": normal(len(rows), tokens, groups, size),
        "value": normal(len(rows), tokens, groups, size),
    }
    if "sinks" in extras:
        arrays["sinks"] = normal(heads).astype(jnp.float32)
    if "prefix" in extras:
        arrays["prefix"] = (normal(3, groups, size), normal(3, groups, size))
    settings = {n: v for n, v in (("scale", 0.4), ("softcap", 2.0)) if n in extras}
    # What is computed at padding is nobody's business: nothing flows back from there.
    real = (span.segment_ids > 0)[:, :, None, None]
    cotangent = jnp.where(real, normal(len(rows), tokens, heads, size), 0)
    return Case(arrays, span, window, settings, cotangent)


def run(function: Callable, made: Case, arrays: dict[str, Any], mask: bool) -> jax.Array:
    seen = visible(made.span, made.span, made.window) if mask else None
    where = Where(made.span, made.span, made.window, seen)
    named = dict(arrays)
    q, k, v = (named.pop(name) for name in ("query", "key", "value"))
    return function(q, k, v, where, named.pop("prefix", None), **named, **made.settings)


def value_and_gradients(function: Callable, made: Case) -> dict[str, np.ndarray]:
    """Attention at the real tokens, and its gradients by every array, by name."""

    @jax.jit
    def both(arrays):
        value, back = jax.vjp(lambda a: run(function, made, a, function is attend), arrays)
        return value, back(made.cotangent.astype(value.dtype))[0]

    value, grads = both(made.arrays)
    assert value.dtype == made.arrays["query"].dtype
    assert bool(jnp.all(jnp.isfinite(value)))
    real = np.asarray(made.span.segment_ids > 0)
    flat, _ = jax.tree_util.tree_flatten_with_path(grads)
    found = {jax.tree_util.keystr(path): np.asarray(leaf, np.float32) for path, leaf in flat}
    return {"value": np.asarray(value, np.float32)[real]} | found


def assert_equal(found: dict[str, np.ndarray], expected: dict[str, np.ndarray], tolerance=1e-5):
    """Compares two results relative to the largest element of each array."""
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        scale = np.abs(array).max()
        np.testing.assert_allclose(found[name], array, atol=tolerance * scale, err_msg=name)
