"""Low-rank adaptation: LoRA, rsLoRA, DoRA, PiSSA, and LoRA+'s second learning rate."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from jaxtune.core.errors import RequestError
from jaxtune.core.quantize import dense, is_quantized
from jaxtune.core.tree import Rules, Tree
from jaxtune.peft.method import (
    FIXED,
    TRAINED,
    Method,
    Probe,
    dropout,
    merge_linears,
    named_key,
    param,
    targeted,
)


class LoraSlot(nnx.Module):
    """y = linear(x) + scale · dropout(x) A B, where B starts at zero.

    DoRA multiplies each output column of W + scale · A B by magnitude / ‖column‖. PiSSA subtracts
    the start A0 B0, so that the base's weights stay as they are while A B starts at W's largest
    singular directions.
    """

    def __init__(self, spec: Lora, d_in: int, d_out: int, axes, rngs: nnx.Rngs):
        bound = 1.0 / math.sqrt(d_in)  # kaiming_uniform(a=√5), as peft and loralib start A
        a = jax.random.uniform(rngs.params(), (d_in, spec.rank), jnp.float32, -bound, bound)
        self.a = param(a, axes[0], None)
        self.b = param(jnp.zeros((spec.rank, d_out), jnp.float32), None, axes[1])
        if spec.variant == "dora":
            self.magnitude = param(jnp.ones((d_out,), jnp.float32), axes[1])
        if spec.variant == "pissa":
            self.a0 = param(jnp.zeros((d_in, spec.rank), jnp.float32), axes[0], None)
            self.b0 = param(jnp.zeros((spec.rank, d_out), jnp.float32), None, axes[1])
        one = jnp.full((), spec.scale, jnp.float32)
        self.scale = param(one) if spec.per_layer else spec.scale
        self.variant, self.rate, self.per_layer = spec.variant, spec.dropout, spec.per_layer

    def __call__(self, x, linear, key):
        """x [..., in] → [..., out]; `key` None turns dropout off."""
        dtype = x.dtype
        scale = self.scale[...] if self.per_layer else self.scale
        h = dropout(x, self.rate, key)
        y = linear.project(x)
        delta = (h @ self.a[...].astype(dtype)) @ self.b[...].astype(dtype)
        if self.variant == "pissa":
            delta -= (h @ self.a0[...].astype(dtype)) @ self.b0[...].astype(dtype)
        y = y + (scale.astype(dtype) if self.per_layer else scale) * delta
        if self.variant == "dora":
            norm = column_norms(linear.weight(), self.a[...], self.b[...], scale)
            y = y * (self.magnitude[...] / norm).astype(dtype)
        return y + linear.offset()


def column_norms(kernel: jax.Array, a: jax.Array, b: jax.Array, scale: float) -> jax.Array:
    """Returns ‖column j of W + scale · A B‖, float32 [..., out], a constant in the gradient.

    ‖w + s u‖² = ‖w‖² + 2 s w·u + s² ‖u‖² with u = A b: the sum is never built.
    """
    kernel, a, b = jax.lax.stop_gradient((kernel.astype(jnp.float32), a, b))
    cross = jnp.einsum("...io,...ir,...ro->...o", kernel, a, b, optimize="optimal")
    gram = jnp.einsum("...ir,...is->...rs", a, a)
    square = jnp.einsum("...ro,...rs,...so->...o", b, gram, b, optimize="optimal")
    total = jnp.sum(kernel**2, axis=-2) + 2 * scale * cross + scale**2 * square
    return jnp.sqrt(jnp.maximum(total, 0.0))


@dataclasses.dataclass(frozen=True)
class Lora(Method):
    """Hu et al. 2021 (arXiv:2106.09685), with its variants.

    Attributes:
        rank: r, the inner width of A [in, r] and B [r, out].
        alpha: the numerator of the scale: alpha / rank, or alpha / √rank for rsLoRA
            (Kalajdzievski 2023, arXiv:2312.03732).
        dropout: rate on the input of A while training.
        targets: see `peft.method.targeted`. Each expert has an A and a B of its own.
        variant: "lora", "rslora", "dora" (Liu et al. 2024, arXiv:2402.09353; its norm is held
            constant in the gradient, section 4.3) or "pissa" (Meng et al. 2024, arXiv:2404.02948).
        ratio: learning rate of B over that of A (LoRA+, Hayou et al. 2024, arXiv:2402.12354).
        per_layer: each layer has a scale of its own, a fixed leaf, in place of `scale`; a layer
            of a smaller rank ends in zero columns of A and zero rows of B, which stay zero in
            training, since the gradient of each is a product with the other.
    """

    name: ClassVar[str] = "lora"
    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: str | tuple[str, ...] = "all-linear"
    variant: str = "lora"
    ratio: float = 1.0
    per_layer: bool = False

    @property
    def scale(self) -> float:
        """The factor of A B."""
        root = math.sqrt(self.rank) if self.variant == "rslora" else self.rank
        return self.alpha / root

    def linear(self, path, d_in, d_out, axes, has_bias, rngs):
        """Returns a LoraSlot for a targeted layer."""
        if targeted(self.targets, path):
            return LoraSlot(self, d_in, d_out, axes, rngs)
        return None

    def routed(self, path, shape, axes, rngs):
        """Returns A, B and a layer's scale for targeted experts, or their router."""
        if not targeted(self.targets, path):
            return None
        *lead, d_in, d_out = shape
        bound = 1.0 / math.sqrt(d_in)
        a = jax.random.uniform(rngs.params(), (*lead, d_in, self.rank), jnp.float32, -bound, bound)
        b = jnp.zeros((*lead, self.rank, d_out), jnp.float32)
        leaves = {"a": param(a, *axes[:-1], None), "b": param(b, *axes[:-2], None, axes[-1])}
        if self.per_layer:
            leaves["scale"] = param(jnp.full((), self.scale, jnp.float32))
        return nnx.Dict(leaves)

    def rules(self) -> Rules:
        """A, B and the magnitude are trained; PiSSA's start and layers' scales are fixed."""
        return ((r".*/lora/(a|b|magnitude)", TRAINED), (r".*/lora/(a0|b0|scale)", FIXED))

    def learning_rate_scales(self) -> Rules:
        """LoRA+: B learns `ratio` times as fast."""
        return ((r".*/lora/b", self.ratio),) if self.ratio != 1.0 else ()

    def start(self, params: Tree, key: jax.Array, probe: Probe) -> Tree:
        """Starts DoRA's magnitudes and PiSSA's factors from the base's kernels.

        Raises:
            RequestError: PiSSA on a quantised kernel. What it would quantise is the rest that its
                start leaves of the kernel, and that is gone.
        """
        del probe
        if self.variant not in ("dora", "pissa"):
            return params

        def begin(path: str, node: dict[str, Any]) -> dict[str, Any]:
            if "lora" not in node:
                return node
            lora = dict(node["lora"])
            if self.variant == "dora":
                lora["magnitude"] = kernel_norms(node["kernel"])
            else:
                if is_quantized(node["kernel"]):
                    raise RequestError(
                        "'pissa' starts from whole weights, and model.quantize keeps none; use "
                        "'lora', 'rslora' or 'dora'",
                        key="peft.variant",
                    )
                kernel = node["kernel"].astype(jnp.float32)
                a, b = principal_factors(kernel, self.rank, named_key(key, path))
                a, b = a / math.sqrt(self.scale), b / math.sqrt(self.scale)
                lora |= {"a": a, "b": b, "a0": jnp.copy(a), "b0": jnp.copy(b)}
            return node | {"lora": lora}

        return merge_linears(params, begin)

    def merge_linear(self, path: str, node: dict[str, Any]) -> dict[str, Any]:
        """Returns kernel + scale · A B (rescaled for DoRA), computed in float32."""
        del path
        if "lora" not in node:
            return node
        node = dict(node)
        lora, kernel = node.pop("lora"), node["kernel"].astype(jnp.float32)
        delta = lora["a"] @ lora["b"]
        if "a0" in lora:
            delta = delta - lora["a0"] @ lora["b0"]
        scale = self.scale
        if self.per_layer:  # of a layer's kernel, or of all its experts'
            scale = jnp.expand_dims(lora["scale"], range(lora["scale"].ndim, kernel.ndim))
        merged = kernel + scale * delta
        if "magnitude" in lora:
            gain = lora["magnitude"] / jnp.linalg.norm(merged, axis=-2)
            merged = merged * gain[..., None, :]
        node["kernel"] = merged.astype(node["kernel"].dtype)
        return node


@jax.jit
def kernel_norms(kernel: Any) -> jax.Array:
    """Returns the column norms of a kernel [..., in, out], quantised or not, float32 [..., out]."""
    return jnp.linalg.norm(dense(kernel, jnp.float32), axis=-2)


def principal_factors(kernel: jax.Array, rank: int, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns A [..., in, r], B [..., r, out] with A B = the best rank-r approximation of kernel.

    A = U √S and B = √S Vᵀ (PiSSA, equations 2 and 3), by subspace iteration with 8 further
    directions and 12 rounds (Halko et al. 2011, arXiv:0909.4061, algorithm 4.4), which needs no
    full decomposition of a large matrix.
    """
    d_in, d_out = kernel.shape[-2:]
    width = min(rank + 8, d_in, d_out)
    probe = jax.random.normal(key, (*kernel.shape[:-2], d_out, width), jnp.float32)
    transposed = jnp.swapaxes(kernel, -1, -2)
    q = jnp.linalg.qr(kernel @ probe)[0]
    for _ in range(12):
        q = jnp.linalg.qr(transposed @ q)[0]
        q = jnp.linalg.qr(kernel @ q)[0]
    u, s, vt = jnp.linalg.svd(jnp.swapaxes(q, -1, -2) @ kernel, full_matrices=False)
    root = jnp.sqrt(s[..., :rank])
    return (q @ u)[..., :rank] * root[..., None, :], vt[..., :rank, :] * root[..., :, None]
