"""An Optax transformation from a specification and the trained parameters' paths."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxtune.core.errors import RequestError
from jaxtune.core.tree import Tree, flatten, unflatten
from jaxtune.optim.anchor import Pull, pull_to_start
from jaxtune.optim.orthogonal import Push, push_apart
from jaxtune.optim.schedules import Schedule
from jaxtune.peft.method import FROZEN, TRAINED


@dataclasses.dataclass(frozen=True)
class OptimSpec:
    """What to build; see `docs/config.md` for the meaning of each key.

    Attributes:
        name: "adamw", "adafactor", "lion", "sgd" or "muon".
        clip_norm: bound of the global norm of the trained gradients, or None.
        layer_decay: factor of the learning rate from each block to the one below it, 1 at the last;
            1 everywhere is the same rate for all.
        groups: (path regex, lr_scale, weight_decay or None) triples; the first match counts.
    """

    name: str = "adamw"
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    momentum: float = 0.9
    weight_decay: float = 0.0
    clip_norm: float | None = 1.0
    layer_decay: float = 1.0
    groups: tuple[tuple[str, float, float | None], ...] = ()


def core(spec: OptimSpec) -> optax.GradientTransformation:
    """Returns the optimizer's own rule, before decay and learning rate."""
    if spec.name == "adamw":
        return optax.scale_by_adam(spec.b1, spec.b2, spec.eps)
    if spec.name == "lion":
        return optax.scale_by_lion(spec.b1, spec.b2)
    if spec.name == "sgd":
        return optax.trace(spec.momentum) if spec.momentum else optax.identity()
    if spec.name == "adafactor":
        return optax.chain(
            optax.scale_by_factored_rms(),
            optax.clip_by_block_rms(1.0),
            optax.scale_by_param_block_rms(),
        )
    return muon(spec)


def muon(spec: OptimSpec) -> optax.GradientTransformation:
    """Muon for the kernels of the blocks, Adam for the rest (Jordan et al. 2024).

    Updates are scaled to Adam's size, 0.2 √max(in, out) (Liu et al. 2025, arXiv:2502.16982), so
    that one learning rate serves both.
    """
    matrix = re.compile(r"blocks/.*(kernel|lora/[ab])")
    dimensions = optax.contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)

    def labels(params: Tree) -> Tree:
        def label(path: tuple, _: jax.Array) -> str:
            name = "/".join(str(key.key) for key in path)
            return "muon" if matrix.fullmatch(name) else "adam"

        return jax.tree_util.tree_map_with_path(label, params)

    def rescale(updates: Tree, _: Tree | None) -> Tree:
        return jax.tree.map(lambda u: u * 0.2 * max(u.shape[-2:]) ** 0.5, updates)

    def numbers(tree: Tree) -> Tree:
        return jax.tree.map(lambda _: dimensions, tree)

    return optax.partition(
        {
            "muon": optax.chain(
                optax.contrib.scale_by_muon(
                    beta=spec.momentum, eps=spec.eps, weight_dimension_numbers=numbers
                ),
                optax.stateless(rescale),
            ),
            "adam": optax.scale_by_adam(spec.b1, spec.b2, spec.eps),
        },
        labels,
    )


def make_transform(
    spec: OptimSpec,
    labels: Tree,
    params: Tree,
    schedule: Schedule,
    scales: Sequence[tuple[str, float]] = (),
    pull: Pull | None = None,
    push: Push | None = None,
) -> optax.GradientTransformation:
    """Returns pull and push → clip → rule → decay → learning rate, a group for each rate and decay.

    Args:
        spec: the specification.
        labels: the label tree of the whole model; what is not trained gets `set_to_zero`.
        params: the parameters that the updates are for; None where a leaf is elsewhere.
        schedule: step → learning rate.
        scales: (path regex, factor) pairs of the method, such as LoRA+'s; they multiply the
            groups' own.
        pull: towards the parameters at the start, if any.
        push: away from earlier adapters' subspaces, if any.

    Raises:
        RequestError: a group's regex matches no trained parameter.
    """
    shapes, kinds = flatten(params), flatten(labels)
    paths = [path for path, leaf in shapes.items() if leaf is not None and kinds[path] == TRAINED]
    for regex, *_ in spec.groups:
        if not any(re.fullmatch(regex, path) for path in paths):
            raise RequestError(
                f"regex {regex!r} matches no trained parameter; one is {paths[0]!r}",
                key="optim.groups",
            )

    def settings(path: str) -> tuple[float, float]:
        scale, decay = 1.0, spec.weight_decay
        for regex, group_scale, group_decay in spec.groups:
            if re.fullmatch(regex, path):
                scale = group_scale
                decay = decay if group_decay is None else group_decay
                break
        for regex, factor in scales:
            if re.fullmatch(regex, path):
                scale *= factor
        return scale, decay

    def group(path: str) -> str:
        if kinds[path] != TRAINED:
            return FROZEN
        return "lr×{:g} decay {:g}".format(*settings(path))

    chains = {FROZEN: optax.set_to_zero()}
    for path in paths:
        scale, decay = settings(path)
        chains[group(path)] = optax.chain(
            core(spec),
            optax.add_decayed_weights(decay) if decay else optax.identity(),
            optax.scale_by_learning_rate(lambda step, s=scale: s * schedule(step)),
        )
    clip = optax.identity() if spec.clip_norm is None else optax.clip_by_global_norm(spec.clip_norm)
    names = unflatten({p: None if leaf is None else group(p) for p, leaf in shapes.items()})
    before = (pull_to_start(pull.l2sp, pull.ewc),) if pull else ()
    before += (push_apart(push),) if push else ()
    behind = () if spec.layer_decay == 1.0 else (by_layer(spec.layer_decay, shapes),)
    return optax.chain(*before, clip, optax.partition(chains, names), *behind)


def by_layer(decay: float, shapes: Mapping[str, Any]) -> optax.GradientTransformation:
    """Returns the transformation that slows the lower layers down.

    Of L blocks, the updates of block l are multiplied by decay^(L − 1 − l), those of the embedding
    by decay^L (Howard and Ruder 2018, arXiv:1801.06146); what lies above the blocks is left alone.

    Args:
        decay: in (0, 1].
        shapes: {path: parameter}; those of the blocks have a layer axis first.
    """
    stacked = [leaf for path, leaf in shapes.items() if leaf is not None and is_block(path)]
    layers = stacked[0].shape[0] if stacked else 0

    def scaled(path: tuple, update: jax.Array) -> jax.Array:
        name = "/".join(str(key.key) for key in path)
        if is_block(name):
            factors = decay ** jnp.arange(layers - 1, -1, -1, dtype=jnp.float32)
            return update * factors.reshape(-1, *(1,) * (update.ndim - 1))
        return update * decay**layers if name.startswith("embed/") else update

    return optax.stateless(lambda updates, _: jax.tree_util.tree_map_with_path(scaled, updates))


def is_block(path: str) -> bool:
    """Tells whether a parameter is one of the stacked layers'."""
    return path.startswith("blocks/")
