"""Linear layers, norms and activations."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxtune.core.quantize import dense, dequantize, quantize
from jaxtune.models.config import ModelConfig
from jaxtune.parallel.rules import constrain
from jaxtune.peft.method import Method, named_key, param

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
}
# gpt-oss: x · sigmoid(1.702 x), with both halves clipped and 1 added to the linear one
# (https://github.com/openai/gpt-oss, gpt_oss/torch/model.py).
CLIPPED, CLIP, SHARPNESS = "swiglu_clipped", 7.0, 1.702


def gated_activation(name: str, gate: jax.Array, up: jax.Array) -> jax.Array:
    """Returns act(gate) · up, [..., I]."""
    if name == CLIPPED:
        gate = jnp.minimum(gate, CLIP)
        return gate * jax.nn.sigmoid(SHARPNESS * gate) * (jnp.clip(up, -CLIP, CLIP) + 1)
    return ACTIVATIONS[name](gate) * up


def kernel_param(value: jax.Array, axes: tuple[str, ...], kind: str) -> Any:
    """Returns a kernel as a parameter, or as two if `kind` says how it is quantised."""
    if kind == "none":
        return param(value, *axes)
    leaves = quantize(value, kind)
    return nnx.Dict({name: param(leaf, *axes) for name, leaf in leaves.items()})


def whole_kernel(axes: tuple[str, str], leaves: dict[str, jax.Array], dtype: Any) -> jax.Array:
    """Returns a quantised kernel [in, out] that no axis of the batch spreads any more.

    What travels between devices are the codes; left alone, XLA gathers what they stand for.
    """
    kept = [None if axis == "embed" else axis for axis in axes]
    return dequantize({name: constrain(leaf, *kept) for name, leaf in leaves.items()}, dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def quantized_product(
    axes: tuple[str, str], x: jax.Array, leaves: dict[str, jax.Array]
) -> jax.Array:
    """Returns x [..., in] times a quantised kernel, whose gradient is not asked for.

    The backward pass has the codes alone and dequantises them again: kept, the kernels would be
    those of all layers in full size.
    """
    return x @ whole_kernel(axes, leaves, x.dtype)


def _forward(axes, x, leaves):
    return quantized_product(axes, x, leaves), leaves


def _backward(axes, leaves, gradient):
    return gradient @ whole_kernel(axes, leaves, gradient.dtype).T, None


quantized_product.defvjp(_forward, _backward)


class Linear(nnx.Module):
    """x [..., in] → x W + b [..., out], seen through the method's slot where it has one."""

    def __init__(
        self,
        config: ModelConfig,
        method: Method,
        path: str,
        shape: tuple[int, int],
        axes: tuple[str, str],
        bias: bool,
        rngs: nnx.Rngs,
        std: float | None = None,
    ):
        std = config.initializer_range if std is None else std
        kind = config.quantize if path.startswith("blocks/") else "none"
        value = std * jax.random.normal(rngs.params(), shape, jnp.float32)
        self.kernel = kernel_param(value, axes, kind)
        self.bias = param(jnp.zeros(shape[1:], jnp.float32), axes[1]) if bias else None
        self.path, self.slot, self.dtype = path, None, config.compute_dtype
        self.axes, self.quantized = axes, kind != "none"
        slot = method.linear(path, *shape, axes, bias, rngs)
        if slot is not None:
            self.slot = method.name
            setattr(self, method.name, slot)

    def weight(self) -> jax.Array:
        """Returns the kernel [in, out]; a quantised one in the compute dtype."""
        return dense(self.leaves(), self.dtype) if self.quantized else self.kernel[...]

    def leaves(self) -> dict[str, jax.Array]:
        """Returns the leaves of a quantised kernel."""
        return {name: leaf[...] for name, leaf in self.kernel.items()}

    def project(self, x: jax.Array) -> jax.Array:
        """Returns x W in x's dtype."""
        if self.quantized:
            return quantized_product(self.axes, x, self.leaves())
        return x @ self.weight().astype(x.dtype)

    def offset(self) -> jax.Array | float:
        """Returns b [out] in the compute dtype, or 0."""
        return 0.0 if self.bias is None else self.bias[...].astype(self.dtype)

    def __call__(self, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """`key` is the dropout key of the layer, None in evaluation."""
        if self.slot is not None:
            return getattr(self, self.slot)(x, self, named_key(key, self.path))
        return self.project(x) + self.offset()


class Norm(nnx.Module):
    """RMS norm (Zhang and Sennrich 2019, arXiv:1910.07467) or layer norm, in float32."""

    def __init__(self, config: ModelConfig, width: int, axis: str | None = "embed"):
        start = jnp.zeros if config.norm_unit_offset else jnp.ones
        self.scale = param(start((width,), jnp.float32), axis)
        self.bias = (
            param(jnp.zeros((width,), jnp.float32), axis) if config.norm == "layer" else None
        )
        self.eps, self.unit_offset = config.norm_eps, config.norm_unit_offset

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., D] → [..., D] in x's dtype."""
        h = x.astype(jnp.float32)
        if self.bias is not None:
            h = h - jnp.mean(h, axis=-1, keepdims=True)
        h = h * jax.lax.rsqrt(jnp.mean(h * h, axis=-1, keepdims=True) + self.eps)
        scale = self.scale[...].astype(jnp.float32)
        h = h * (1 + scale if self.unit_offset else scale)
        if self.bias is not None:
            h = h + self.bias[...].astype(jnp.float32)
        return h.astype(x.dtype)
