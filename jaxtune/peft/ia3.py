"""IA3: trained scales on keys, values and the inner MLP activation."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from jaxtune.core.tree import Rules
from jaxtune.peft.method import TRAINED, Method, param, targeted

# The layers whose input is scaled (the inner activation), as peft's feedforward modules.
INPUT_SCALED = ("down_proj",)


class Ia3Slot(nnx.Module):
    """linear(x) · scale, or linear(x · scale) for a layer whose input is the inner activation."""

    def __init__(self, width: int, axis: str, on_input: bool):
        self.scale = param(jnp.ones((width,), jnp.float32), axis)
        self.on_input = on_input

    def __call__(self, x, linear, key):
        """x [..., in] → [..., out]."""
        del key
        scale = self.scale[...].astype(x.dtype)
        if self.on_input:
            return linear.project(x * scale) + linear.offset()
        return (linear.project(x) + linear.offset()) * scale


@dataclasses.dataclass(frozen=True)
class Ia3(Method):
    """Liu et al. 2022 (arXiv:2205.05638).

    Attributes:
        targets: layers to scale; see `peft.method.targeted`.
    """

    name: ClassVar[str] = "ia3"
    targets: str | tuple[str, ...] = ("k_proj", "v_proj", "down_proj")

    def linear(self, path, d_in, d_out, axes, has_bias, rngs):
        """Returns an Ia3Slot for a targeted layer."""
        del rngs
        if not targeted(self.targets, path):
            return None
        on_input = scales_input(path)
        width, axis = (d_in, axes[0]) if on_input else (d_out, axes[1])
        return Ia3Slot(width, axis, on_input)

    def rules(self) -> Rules:
        """The scales are trained."""
        return ((r".*/ia3/scale", TRAINED),)

    def merge_linear(self, path: str, node: dict[str, Any]) -> dict[str, Any]:
        """Scales the kernel's rows (input), or its columns and bias (output)."""
        if "ia3" not in node:
            return node
        node = dict(node)
        scale = node.pop("ia3")["scale"]
        if scales_input(path):
            return node | {"kernel": scaled(node["kernel"], scale[..., :, None])}
        node["kernel"] = scaled(node["kernel"], scale[..., None, :])
        if "bias" in node:
            node["bias"] = scaled(node["bias"], scale)
        return node


def scales_input(path: str) -> bool:
    """Tells whether the layer at `path` is scaled on its input."""
    return path.rsplit("/", 1)[-1] in INPUT_SCALED


def scaled(weight: jax.Array, scale: jax.Array) -> jax.Array:
    """Returns weight · scale, computed in float32, in the weight's dtype."""
    return (weight.astype(jnp.float32) * scale).astype(weight.dtype)
