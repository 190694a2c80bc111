"""BitFit: only biases are trained."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx

from jaxtune.core.tree import Rules
from jaxtune.peft.method import TRAINED, Method, param, targeted


class BiasSlot(nnx.Module):
    """linear(x) + bias, from zero: the bias that a bias-free layer lacks."""

    def __init__(self, d_out: int, axis: str):
        self.bias = param(jnp.zeros((d_out,), jnp.float32), axis)

    def __call__(self, x, linear, key):
        """x [..., in] → [..., out]."""
        del key
        return linear.project(x) + linear.offset() + self.bias[...].astype(x.dtype)


@dataclasses.dataclass(frozen=True)
class BitFit(Method):
    """Ben Zaken et al. 2021 (arXiv:2106.10199).

    Every bias that the base has is trained (linear layers and norms); a targeted linear layer
    without one is given a zero bias, since most decoders have none.

    Attributes:
        targets: layers that get a bias; see `peft.method.targeted`.
    """

    name: ClassVar[str] = "bitfit"
    targets: str | tuple[str, ...] = "all-linear"

    def linear(self, path, d_in, d_out, axes, has_bias, rngs):
        """Returns a BiasSlot for a targeted layer."""
        del d_in, rngs
        wanted = targeted(self.targets, path) and not has_bias
        return BiasSlot(d_out, axes[1]) if wanted else None

    def rules(self) -> Rules:
        """Biases are trained."""
        return ((r".*/bias", TRAINED),)

    def merge_linear(self, path: str, node: dict[str, Any]) -> dict[str, Any]:
        """Makes the added bias the layer's own."""
        del path
        if "bitfit" not in node:
            return node
        node = dict(node)
        return node | {"bias": node.pop("bitfit")["bias"].astype(node["kernel"].dtype)}
