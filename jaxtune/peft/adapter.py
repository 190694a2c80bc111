"""Bottleneck adapters."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from jaxtune.core.tree import Rules
from jaxtune.peft.method import TRAINED, Method, param

ACTIVATIONS = {"gelu": jax.nn.gelu, "relu": jax.nn.relu, "silu": jax.nn.silu}


class Bottleneck(nnx.Module):
    """up(activation(down(h))), with `up` at zero, so that the model starts unchanged.

    Serial adapters read and correct the sub-layer's output; a parallel one reads its input.
    """

    def __init__(self, spec: Adapter, d_model: int, rngs: nnx.Rngs):
        down = jax.random.normal(rngs.params(), (d_model, spec.bottleneck), jnp.float32)
        self.down = nnx.Dict(
            kernel=param(down * d_model**-0.5, "embed", None),
            bias=param(jnp.zeros((spec.bottleneck,), jnp.float32), None),
        )
        self.up = nnx.Dict(
            kernel=param(jnp.zeros((spec.bottleneck, d_model), jnp.float32), None, "embed"),
            bias=param(jnp.zeros((d_model,), jnp.float32), "embed"),
        )
        self.activation, self.parallel = spec.activation, spec.placement == "parallel"

    def __call__(self, x, y):
        """x, y [..., D], the sub-layer's input and output → the new output."""
        dtype = y.dtype
        h = x if self.parallel else y
        h = h @ self.down["kernel"][...].astype(dtype) + self.down["bias"][...].astype(dtype)
        h = ACTIVATIONS[self.activation](h)
        return y + h @ self.up["kernel"][...].astype(dtype) + self.up["bias"][...].astype(dtype)


@dataclasses.dataclass(frozen=True)
class Adapter(Method):
    """Bottleneck adapters inside each block.

    Attributes:
        bottleneck: inner width.
        placement: "houlsby" behind attention and MLP (Houlsby et al. 2019, arXiv:1902.00751),
            "pfeiffer" behind the MLP only (Pfeiffer et al. 2020, arXiv:2005.00247), "parallel"
            beside the MLP (He et al. 2021, arXiv:2110.04366).
        activation: "gelu", "relu" or "silu".
    """

    name: ClassVar[str] = "adapter"
    mergeable: ClassVar[bool] = False
    bottleneck: int = 64
    placement: str = "houlsby"
    activation: str = "gelu"

    def sublayer(self, place, d_model, rngs):
        """Returns a Bottleneck where the placement has one."""
        if place == "mlp" or self.placement == "houlsby":
            return Bottleneck(self, d_model, rngs)
        return None

    def rules(self) -> Rules:
        """Every adapter leaf is trained."""
        return ((r".*/adapter_(attn|mlp)/.*", TRAINED),)
