"""Quantised matrices against their formula, written out in numpy, and against qwix."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxtune.core.errors import RequestError
from jaxtune.core.quantize import (
    block_size,
    dense_tree,
    dequantize,
    is_quantized,
    quantize,
)
from jaxtune.core.tree import nbytes

# arXiv:2305.14314, appendix E, as bitsandbytes has them too.
# fmt: off
LEVELS = np.asarray([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
], np.float32)
# fmt: on
KINDS = ("int8", "nf4")
SHAPES = [(128, 24), (3, 172, 8), (2, 3, 64, 5)]


def kernel(shape, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    w = rng.standard_normal(shape, np.float32)
    w[..., :, 0] *= 100.0  # columns of very different size
    w[..., :, 1] = 0.0
    return w


def blocks(w: np.ndarray, block: int) -> np.ndarray:
    """[..., in, out] → [..., blocks, block, out]."""
    return w.reshape(*w.shape[:-2], -1, block, w.shape[-1])


def oracle(w: np.ndarray, kind: str, block: int) -> tuple[np.ndarray, np.ndarray]:
    """(the levels' numbers or integers [..., in, out], absmax): each weight on its own."""
    parts = blocks(w, block)
    absmax = np.abs(parts).max(axis=-2).astype(ml_dtypes.bfloat16).astype(np.float32)
    unit = parts / np.where(absmax == 0, 1, absmax)[..., None, :]
    if kind == "int8":
        numbers = np.clip(np.round(unit * 127), -127, 127)
    else:
        numbers = np.abs(unit[..., None] - LEVELS).argmin(axis=-1)
    return numbers.reshape(w.shape).astype(np.int32), absmax


def value(numbers: np.ndarray, absmax: np.ndarray, kind: str, block: int) -> np.ndarray:
    levels = LEVELS[numbers] if kind == "nf4" else numbers / np.float32(127)
    return (blocks(levels, block) * absmax[..., None, :]).reshape(numbers.shape)


def numbers_of(codes: np.ndarray, block: int) -> np.ndarray:
    """Unpacks nf4 codes by hand, one block and row after the other."""
    packed = codes.reshape(*codes.shape[:-2], -1, block // 2, codes.shape[-1])
    out = np.zeros((*packed.shape[:-2], block, codes.shape[-1]), np.int32)
    for j in range(block // 2):
        out[..., j, :] = packed[..., j, :] & 15
        out[..., j + block // 2, :] = packed[..., j, :] // 16
    return out.reshape(*codes.shape[:-2], -1, codes.shape[-1])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_codes_and_values_are_the_formulas(kind, shape):
    w, block = kernel(shape), block_size(shape[-2], kind)
    numbers, absmax = oracle(w, kind, block)
    leaves = jax.jit(functools.partial(quantize, kind=kind))(w)
    assert leaves["absmax"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(leaves["absmax"].astype(np.float32), absmax)
    codes = np.asarray(leaves["codes"])
    assert codes.dtype == (np.uint8 if kind == "nf4" else np.int8)
    found = numbers_of(codes, block) if kind == "nf4" else codes
    np.testing.assert_array_equal(found, numbers)
    back = jax.jit(dequantize, static_argnums=1)(leaves, jnp.float32)
    np.testing.assert_allclose(back, value(numbers, absmax, kind, block), rtol=1e-6)
    assert np.all(np.asarray(back)[..., :, 1] == 0)  # a block of zeros stays one


@pytest.mark.parametrize("kind", KINDS)
def test_the_error_is_at_most_half_a_gap(kind):
    """And on normal weights it is that of the paper's data type: 9.2 % (0.6 % for int8)."""
    w = kernel((256, 300), seed=1)
    back = np.asarray(dequantize(quantize(jnp.asarray(w), kind), jnp.float32))
    gap = np.diff(LEVELS).max() if kind == "nf4" else 1 / 127
    largest = np.abs(blocks(w, 64)).max(axis=-2)[..., None, :]
    # bfloat16 may round a block's largest magnitude down by 1 / 512
    assert np.all(np.abs(blocks(back - w, 64)) <= largest * (gap / 2 + 2**-8))
    plain = w[:, 2:]
    error = np.sqrt(np.mean((back[:, 2:] - plain) ** 2) / np.mean(plain**2))
    assert error < (0.095 if kind == "nf4" else 0.0065)


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_and_not_compiled_are_the_same_bits(kind):
    w = jnp.asarray(kernel((128, 24)))
    plain, compiled = quantize(w, kind), jax.jit(functools.partial(quantize, kind=kind))(w)
    for name, leaf in plain.items():
        assert leaf.tobytes() == compiled[name].tobytes()


def test_nf4_equals_qwix():
    """Where the largest magnitudes are powers of two, which bfloat16 holds exactly."""
    qwix = pytest.importorskip("qwix")
    w = np.random.default_rng(2).uniform(-1, 1, (192, 16)).astype(np.float32)
    w[5::64] = 2.0 ** np.random.default_rng(3).integers(0, 5, (3, 16))
    theirs = qwix.quantize(jnp.asarray(w), "nf4", channelwise_axes=[1], tiled_axes={0: 64})
    ours = dequantize(quantize(jnp.asarray(w), "nf4"), jnp.float32)
    np.testing.assert_allclose(ours, qwix.dequantize(theirs), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("width", "kind", "block"),
    [(4096, "nf4", 64), (11008, "int8", 64), (172, "nf4", 86), (352, "nf4", 88), (32, "nf4", 32)],
)
def test_blocks_divide_the_width(width, kind, block):
    assert block_size(width, kind) == block


def test_an_odd_width_is_refused_for_nf4_alone():
    assert block_size(33, "int8") == 33
    with pytest.raises(RequestError, match="reads 33") as error:
        quantize(jnp.zeros((33, 4)), "nf4")
    assert error.value.key == "model.quantize"


@pytest.mark.parametrize(("kind", "size"), [("int8", 1 + 1 / 32), ("nf4", 0.5 + 1 / 32)])
def test_bytes_of_a_weight(kind, size):
    assert nbytes(quantize(jnp.zeros((256, 64)), kind)) == size * 256 * 64


def test_a_tree_becomes_dense_where_it_is_quantised():
    w = jnp.asarray(kernel((64, 4)))
    tree = {"a": {"kernel": quantize(w, "int8"), "bias": jnp.ones(4, jnp.bfloat16)}}
    assert is_quantized(tree["a"]["kernel"]) and not is_quantized(tree["a"])
    result = dense_tree(tree, jnp.float32)
    assert result["a"]["bias"] is tree["a"]["bias"]
    np.testing.assert_allclose(result["a"]["kernel"], w, atol=2.0)
    assert result["a"]["kernel"].dtype == jnp.float32
