"""What every method is: the parameters that it adds to a model, with a rule that labels each path.

A model calls the hooks of its method while it is built; each hook returns the module that fills
that place (a slot) or None. Labels are `TRAINED`, `FIXED` (added and saved, not trained) and
`FROZEN` (the base's).
"""

from __future__ import annotations

import dataclasses
import re
import zlib
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from jaxtune.core.errors import RequestError
from jaxtune.core.quantize import dense_tree
from jaxtune.core.tree import Rules, Tree, flatten, label_tree

TRAINED, FIXED, FROZEN = "trained", "fixed", "frozen"
NEW_ROWS = "(embed|lm_head)/added"
SCORE = "score/kernel"  # the score head, which every method trains whole

# ids [1, P] -> (keys [L, P, K*H], values [L, P, K*H]) of the base model, rotated.
Probe = Callable[[jax.Array], tuple[jax.Array, jax.Array]]


@dataclasses.dataclass(frozen=True)
class Method:
    """Adds nothing and trains nothing; the methods override what they need.

    Attributes:
        train: regexes of further parameter paths to train beside the method's own.
        new_rows: (first id, count) of tokens whose rows of embedding and head are trained, in
            place of those of the base's tables.
    """

    name: ClassVar[str] = "base"
    mergeable: ClassVar[bool] = True
    # Whether a fresh start computes what the base without the additions computes.
    starts_as_base: ClassVar[bool] = True
    train: tuple[str, ...] = ()
    new_rows: tuple[int, int] | None = None

    # -- slots ------------------------------------------------------------------------------
    def linear(
        self, path: str, d_in: int, d_out: int, axes, has_bias: bool, rngs: nnx.Rngs
    ) -> nnx.Module | None:
        """Returns the slot of the linear layer at `path`, called as `slot(x, linear, key)`.

        `linear.project(x)` is x [..., in] times the kernel; `linear.offset()` its bias, or 0;
        `linear.weight()` the kernel. The slot is kept under the method's name.
        """

    def routed(
        self, path: str, shape: tuple[int, ...], axes: tuple[str | None, ...], rngs: nnx.Rngs
    ) -> nnx.Dict | None:
        """Returns what is added to a router [in, out] or the experts [E, in, out] at `path`.

        It is kept under the method's name: `a` [..., in, r] and `b` [..., r, out], which add
        scale · a b to the kernel, where scale is the leaf of that name or else the method's.
        """

    def sublayer(self, place: str, d_model: int, rngs: nnx.Rngs) -> nnx.Module | None:
        """Returns the slot behind a sub-layer (`place` "attn" or "mlp").

        It is called as `slot(x, y)` with the sub-layer's input and output, both [..., D].
        """

    def attention(self, kv_width: int, rngs: nnx.Rngs) -> nnx.Module | None:
        """Returns a slot with `key` and `value` [P, K*H], which every token attends to."""

    def embedding(self, d_model: int, rngs: nnx.Rngs) -> nnx.Module | None:
        """Returns a slot with `embedding` [P, D], the virtual tokens at each segment's start."""

    @property
    def num_virtual(self) -> int:
        """Slots that each segment reserves for virtual tokens."""
        return 0

    @property
    def position_offset(self) -> int:
        """The position of a segment's first token."""
        return 0

    # -- rules ------------------------------------------------------------------------------
    def rules(self) -> Rules:
        """Returns the label rules of the method's own parameters."""
        return ()

    def learning_rate_scales(self) -> Rules:
        """Returns `(path regex, scale)` pairs for parameters that learn at another rate."""
        return ()

    def start(self, params: Tree, key: jax.Array, probe: Probe) -> Tree:
        """Returns `params` with the method's own leaves started from the base's weights."""
        del key, probe
        return params

    def merge(self, params: Tree) -> Tree:
        """Returns base parameters that compute what base and method compute together.

        Quantised kernels become float32: what they lost stays lost.

        Raises:
            RequestError: the method cannot be folded into the base's weights.
        """
        if not self.mergeable:
            raise RequestError(
                f"method {self.name!r} cannot be merged into the base; export format 'peft'",
                key="peft.method",
            )
        merged = merge_linears(dense_tree(params, jnp.float32), self.merge_linear)
        return merged if self.new_rows is None else merge_rows(merged, self.new_rows[0])

    def merge_linear(self, path: str, node: dict[str, Any]) -> dict[str, Any]:
        """Returns the merged leaves of one (stacked) linear layer."""
        del path
        return node


def labels(method: Method, params: Tree) -> Tree:
    """Returns the label tree of a model's parameters under a method.

    Raises:
        RequestError: a regex of `peft.train` matches no parameter.
    """
    paths = list(flatten(params))
    for regex in method.train:
        if not any(re.fullmatch(regex, path) for path in paths):
            raise RequestError(
                f"regex {regex!r} matches no parameter; paths look like {paths[0]!r}",
                key="peft.train",
            )
    chosen = [(regex, TRAINED) for regex in (NEW_ROWS, SCORE, *method.train)]
    rules = [*chosen, *method.rules(), (".*", FROZEN)]
    return label_tree(params, rules, unused="allow")


def targeted(targets: str | tuple[str, ...], path: str) -> bool:
    """Tells whether a linear layer is among the targets.

    `targets` is "all-linear" (every linear layer of the blocks that all tokens pass, so neither
    experts nor their router), a regex that matches the whole path, such as
    `blocks/attn/(q|v)_proj`, or names, such as ("q_proj", "v_proj").
    """
    if isinstance(targets, str):
        if targets == "all-linear":
            return path.startswith("blocks/") and not is_routed(path)
        return re.fullmatch(targets, path) is not None
    return path.rsplit("/", 1)[-1] in targets or path in targets


def is_routed(path: str) -> bool:
    """Tells whether a path is that of experts or of their router.

    >>> is_routed("blocks/mlp/experts/up_proj"), is_routed("blocks/mlp/up_proj")
    (True, False)
    """
    return re.search("/(experts|router)(/|$)", path) is not None


def merge_linears(params: Tree, merge_linear: Callable[[str, dict], dict], path: str = "") -> Tree:
    """Returns `params` with `merge_linear(path, node)` in place of every node with a `kernel`."""
    if not isinstance(params, dict):
        return params
    if "kernel" in params:
        return merge_linear(path, params)
    return {
        name: merge_linears(child, merge_linear, f"{path}/{name}" if path else name)
        for name, child in params.items()
    }


def merge_rows(params: Tree, start: int) -> Tree:
    """Returns `params` with the trained rows of new tokens in the tables, from id `start` on."""
    merged = dict(params)
    for name, leaf, axis in (("embed", "embedding", 0), ("lm_head", "kernel", 1)):
        if "added" in params.get(name, {}):
            node = dict(params[name])
            added = node.pop("added").astype(node[leaf].dtype)
            node[leaf] = jax.lax.dynamic_update_slice_in_dim(node[leaf], added, start, axis)
            merged[name] = node
    return merged


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Returns x with elements zeroed at `rate` and the rest scaled up; x itself without a key."""
    if rate == 0.0 or key is None:
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), 0.0).astype(x.dtype)


def named_key(key: jax.Array | None, path: str) -> jax.Array | None:
    """Returns a key of its own for a named place; None stays None."""
    return None if key is None else jax.random.fold_in(key, zlib.crc32(path.encode()) & 0x7FFFFFFF)


def param(value: jax.Array, *logical_axes: str | None) -> nnx.Param:
    """Returns a float32 parameter with its logical axes; see `parallel.rules`."""
    return nnx.Param(value, logical_axes=logical_axes)
