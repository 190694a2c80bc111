"""Base and method → the parameters of a model, partitioned and laid out."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxtune.checkpoints import adapters, peft_lora
from jaxtune.core.errors import RequestError
from jaxtune.core.tree import Tree, flatten, map_paths, partition, size, unflatten
from jaxtune.models.config import ModelConfig
from jaxtune.models.decoder import abstract_params, init_params, param_axes
from jaxtune.models.probe import probe
from jaxtune.parallel.findings import Finding, findings
from jaxtune.parallel.rules import shardings
from jaxtune.peft.method import FIXED, FROZEN, TRAINED, Method, labels
from jaxtune.recipes.base import Base

TEACHER = "teacher"  # the node of a second model's parameters


@dataclasses.dataclass(frozen=True)
class Parts:
    """A model in its partitions, as shapes.

    Attributes:
        config, method: what was built.
        labels: the label tree.
        shapes: ShapeDtypeStructs with the dtypes of the run.
        shardings: NamedSharding of each parameter.
        findings: where the mesh does not let a parameter follow its rule.
        teacher: a second model, whose parameters lie below the node `TEACHER`; or None.
    """

    config: ModelConfig
    method: Method
    labels: Tree
    shapes: Tree
    shardings: Tree
    findings: tuple[Finding, ...] = ()
    teacher: ModelConfig | None = None

    def split(self, tree: Tree) -> tuple[Tree, Tree]:
        """Returns (trained, the rest), with None in each other's places."""
        trained, rest = partition(tree, self.labels, lambda label: label == TRAINED)
        trained.pop(TEACHER, None)  # it has no place in a checkpoint
        return trained, rest

    def fixed(self, tree: Tree) -> dict[str, Any]:
        """Returns {path: leaf} of what the method added without training it."""
        kinds = flatten(self.labels)
        return {path: leaf for path, leaf in flatten(tree).items() if kinds[path] == FIXED}

    def saved_shapes(self) -> dict[str, Tree]:
        """Returns the shapes, with shardings, of what a checkpoint's `model` holds."""
        placed = map_paths(
            lambda _, leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
            self.shapes,
            self.shardings,
        )
        return {"trainable": self.split(placed)[0], "fixed": unflatten(self.fixed(placed))}

    def counts(self) -> dict[str, int]:
        """Returns the numbers of parameters, `total` and `trainable`; a code is a parameter."""
        whole = abstract_params(self.config.unquantized, self.method)
        return {"total": size(whole), "trainable": size(self.split(self.shapes)[0])}


def plan_parts(config: ModelConfig, method: Method, mesh: Mesh) -> Parts:
    """Returns the partitions of a model, without any weights.

    Trained and fixed leaves are float32: an update of bfloat16 weights rounds to nothing
    (CORRECTNESS C19). Frozen leaves have the config's dtype, quantised ones their own.

    Raises:
        RequestError: a quantised kernel would be trained.
    """
    check_frozen(config, method)
    abstract = abstract_params(config, method)
    tree = labels(method, abstract)

    def shape(_: str, leaf: jax.ShapeDtypeStruct, label: str) -> jax.ShapeDtypeStruct:
        if leaf.dtype != jnp.float32:
            return leaf
        dtype = config.compute_dtype if label == FROZEN else jnp.float32
        return jax.ShapeDtypeStruct(leaf.shape, dtype)

    axes, shapes = param_axes(config, method), map_paths(shape, abstract, tree)
    placed = shardings(axes, shapes, mesh)
    return Parts(config, method, tree, shapes, placed, tuple(findings(axes, shapes, mesh)))


def check_frozen(config: ModelConfig, method: Method) -> None:
    """Raises RequestError if a method trains a kernel that the config quantises."""
    if config.quantize == "none":
        return
    held = flatten(abstract_params(config, method))
    whole = abstract_params(config.unquantized, method)
    wrong = [p for p, x in flatten(labels(method, whole)).items() if x == TRAINED and p not in held]
    if wrong:
        raise RequestError(
            f"{wrong[0]!r} would be trained, and model.quantize = {config.quantize!r} holds it in "
            "codes, which have no gradient; leave it frozen, or set model.quantize=none",
            key="peft.train" if method.train else "peft.method",
        )


def load_parts(base: Base, parts: Parts, mesh: Mesh, seed: int, init_from: str | None) -> Tree:
    """Returns the parameters: the base's weights, and the method's own from their start.

    Args:
        base: where the weights come from.
        parts: what to build.
        mesh: the mesh.
        seed: of the method's random start.
        init_from: adapter directory to start from, or None.
    """
    dtypes = {path: leaf.dtype for path, leaf in flatten(parts.shapes).items()}
    params = flatten(base.load(dtypes.__getitem__, mesh, parts.config.quantize))
    loaded: dict[str, Any] = {}
    if init_from is not None:
        loaded = adapters.load_adapter(init_from, parts.config, parts.method, params)
    return unflatten(with_method(params, parts, seed, loaded))


def with_method(
    params: Mapping[str, Any], parts: Parts, seed: int, loaded: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns {path: leaf} of the base's parameters and the method's own, in the order of `parts`.

    Args:
        params: {path: leaf} of the base's.
        parts: what to build.
        seed: of the method's random start.
        loaded: {path: array} that an adapter directory gave: the method's own leaves, all of them
            or all but PiSSA's start, and those of the base's that it replaces.
    """
    shapes, places = flatten(parts.shapes), flatten(parts.shardings)
    added = [path for path in shapes if path not in params]
    if loaded:  # of a PEFT directory only PiSSA's start is missing, which the base's weights give
        loaded = {**peft_lora.pissa_starts(parts.method, params, loaded), **loaded}
    if any(path not in loaded for path in added):
        out = {path: places[path] for path in added}
        key = jax.random.fold_in(jax.random.key(seed), 1)

        def begin() -> dict[str, jax.Array]:
            # Only the method's leaves are returned, so the random base is never computed.
            drawn = flatten(init_params(parts.config, parts.method, key))
            return {path: drawn[path] for path in added}

        own = {path: leaf for path, leaf in params.items() if not path.startswith(f"{TEACHER}/")}
        full = unflatten({**own, **jax.jit(begin, out_shardings=out)()})
        begun = parts.method.start(full, jax.random.fold_in(key, 1), probe(parts.config, full))
        fresh = flatten(begun) | own_rows(params, parts.method.new_rows)
        loaded = {path: fresh[path] for path in added} | dict(loaded)
    placed = {
        path: jax.device_put(jnp.asarray(leaf, shapes[path].dtype), places[path])
        for path, leaf in loaded.items()
    }
    whole = {**params, **placed}
    return {path: whole[path] for path in shapes}


def own_rows(params: Mapping[str, Any], new_rows: tuple[int, int] | None) -> dict[str, jax.Array]:
    """Returns {path: leaf} of the rows of new tokens, as the base's tables have them."""
    if new_rows is None:
        return {}
    start, stop = new_rows[0], sum(new_rows)
    own = {"embed/added": params["embed/embedding"][start:stop]}
    if "lm_head/kernel" in params:
        own["lm_head/added"] = params["lm_head/kernel"][:, start:stop]
    return own
