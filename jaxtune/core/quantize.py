"""Matrices in 4 or 8 bits: blocks of the input axis, each with its largest magnitude.

A quantised kernel is two leaves in place of one, {"codes", "absmax"}, of the kernel's rank and
order of axes, so that labels, shardings, byte counts and files treat them as any leaf.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.core.errors import RequestError
from jaxtune.core.tree import Tree

KINDS = ("int8", "nf4")
CODES, ABSMAX = "codes", "absmax"
BLOCK = 64
# 4-bit NormalFloat: quantiles of a normal distribution, with a level at 0 (Dettmers et al. 2023,
# arXiv:2305.14314, appendix E).
NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


def block_size(width: int, kind: str) -> int:
    """Returns how many weights of a column share a scale: the divisor of `width` nearest to 64.

    >>> block_size(4096, "nf4"), block_size(172, "nf4"), block_size(32, "int8")
    (64, 86, 32)

    Raises:
        RequestError: two codes of nf4 go into a byte, so an odd width has no place.
    """
    divisors = [n for n in range(1, width + 1) if width % n == 0]
    fitting = [n for n in divisors if kind != "nf4" or n % 2 == 0]
    if not fitting:
        raise RequestError(
            f"{kind!r} needs even widths, and a layer reads {width}; int8 has no such limit",
            key="model.quantize",
        )
    return min(fitting, key=lambda n: max(n / BLOCK, BLOCK / n))


def quantize(kernel: jax.Array, kind: str) -> dict[str, jax.Array]:
    """Returns a kernel [..., in, out] as {"codes", "absmax"}.

    A block is `block_size` weights of a column. Its weights are divided by its largest magnitude
    and rounded to the nearest level: k / 127 for int8, `NF4` for nf4.

    Returns:
        absmax: bfloat16 [..., in / block, out]. Half the bytes of float32, and the error of the
            weights is the same to three digits, because codes are chosen for the rounded value.
        codes: int8 [..., in, out]; for nf4 uint8 [..., in / 2, out], where row j of a block holds
            the level's number of weight j in its low bits, that of weight j + block / 2 above.
    """
    *lead, d_in, d_out = kernel.shape
    block = block_size(d_in, kind)
    weights = kernel.astype(jnp.float32).reshape(*lead, d_in // block, block, d_out)
    # A mere cast to bfloat16 and back may be left out by XLA.
    largest = jax.lax.reduce_precision(jnp.max(jnp.abs(weights), axis=-2), 8, 7)
    unit = weights / jnp.where(largest == 0, 1.0, largest)[..., None, :]
    if kind == "int8":
        codes = jnp.clip(jnp.round(unit * 127), -127, 127).astype(jnp.int8)
        codes = codes.reshape(kernel.shape)
    else:
        middles = (np.asarray(NF4[1:], np.float32) + np.asarray(NF4[:-1], np.float32)) / 2
        number = sum((unit > middle).astype(jnp.uint8) for middle in middles)
        low, high = jnp.split(number, 2, axis=-2)
        codes = (low | (high << 4)).reshape(*lead, d_in // 2, d_out)
    return {CODES: codes, ABSMAX: largest.astype(jnp.bfloat16)}


def dequantize(leaves: Mapping[str, jax.Array], dtype: Any) -> jax.Array:
    """Returns the kernel [..., in, out] of {"codes", "absmax"}, rounded once, to `dtype`."""
    codes, absmax = leaves[CODES], leaves[ABSMAX].astype(jnp.float32)
    *lead, count, d_out = absmax.shape
    blocks = codes.reshape(*lead, count, -1, d_out)
    if codes.dtype == jnp.uint8:
        # Tied to what differs between layers: XLA on CPU would build each level in the shape of
        # the kernel once, before the loop over the layers, and hold all 16.
        values, absmax = jax.lax.optimization_barrier((jnp.asarray(NF4, jnp.float32), absmax))
        levels = jnp.concatenate([level(values, blocks & 15), level(values, blocks >> 4)], axis=-2)
    else:
        levels, absmax = blocks.astype(jnp.float32), absmax / 127
    weights = levels * absmax[..., None, :]
    return weights.astype(dtype).reshape(*lead, -1, d_out)


def level(values: jax.Array, number: jax.Array) -> jax.Array:
    """Returns values[number] of 16 values, by 15 selections, which fuse into a matrix product.

    Indexing does not: for TPU it compiles to a gather that is slower than the product.
    """
    chosen = list(values)
    for bit in range(4):
        on = (number >> bit) & 1 == 1
        chosen = [jnp.where(on, b, a) for a, b in zip(chosen[::2], chosen[1::2], strict=True)]
    return chosen[0]


def is_quantized(node: Any) -> bool:
    """Tells whether a node of a parameter tree is a quantised kernel."""
    return isinstance(node, Mapping) and node.keys() == {CODES, ABSMAX}


def dense(kernel: Any, dtype: Any) -> jax.Array:
    """Returns a kernel, quantised or not, as one array [..., in, out] of `dtype`."""
    return dequantize(kernel, dtype) if is_quantized(kernel) else kernel.astype(dtype)


_dequantize = jax.jit(dequantize, static_argnums=1)


def dense_tree(params: Tree, dtype: Any) -> Tree:
    """Returns `params` with one array of `dtype` in place of each quantised kernel."""
    if is_quantized(params):
        return _dequantize(params, jnp.dtype(dtype))
    if not isinstance(params, Mapping):
        return params
    return {name: dense_tree(child, dtype) for name, child in params.items()}
