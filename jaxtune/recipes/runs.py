"""What a config starts from: the base that it names, which may be another run's result."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from jaxtune.checkpoints.fingerprint import fingerprint_files
from jaxtune.checkpoints.hf_export import config_of, with_biases
from jaxtune.checkpoints.hub import local_directory
from jaxtune.checkpoints.runs import RunCheckpoints
from jaxtune.core.errors import RequestError
from jaxtune.core.places import is_remote, local_copy
from jaxtune.core.tree import Tree, flatten, map_paths, unflatten
from jaxtune.data.tokenizer import load_tokenizer
from jaxtune.models.config import ModelConfig
from jaxtune.peft.method import Method
from jaxtune.peft.registry import method_of_spec
from jaxtune.recipes import workdir as files
from jaxtune.recipes.assemble import Parts, plan_parts
from jaxtune.recipes.base import (
    Base,
    base_shardings,
    check_vocabulary,
    from_hf,
    from_preset,
    is_run,
    overridden,
    quantized,
)
from jaxtune.recipes.heads import LANGUAGE_MODEL, Heads, heads_of, with_heads
from jaxtune.recipes.new_tokens import with_new_tokens
from jaxtune.recipes.schema.resolve import resolve
from jaxtune.training.workdir import read_json


@dataclasses.dataclass(frozen=True)
class Run:
    """A workdir with a checkpoint.

    Attributes:
        workdir: the directory.
        config: its resolved config.
        base: what it adapts, with the run's tokenizer.
        method: how.
        step: the checkpoint that is used: the best one if the run keeps it, else the newest.
    """

    workdir: Path
    config: Any
    base: Base
    method: Method
    step: int

    def load(self, parts: Parts, mesh: Mesh) -> Tree:
        """Returns all parameters in the dtypes and places of `parts`."""
        base, held = self.load_apart(parts, mesh)
        return unflatten({path: (base | held)[path] for path in flatten(parts.shapes)})

    def load_apart(self, parts: Parts, mesh: Mesh) -> tuple[dict[str, Any], dict[str, Any]]:
        """Returns {path: leaf} of the base as it was, and of what the run added or trained."""
        shapes = {path: leaf.dtype for path, leaf in flatten(parts.shapes).items()}
        params = flatten(self.base.load(lambda path: shapes[path], mesh, parts.config.quantize))
        saved = files.open_checkpoints(self.workdir, self.config, reading=True)
        try:
            trees = saved.restore(self.step, "model", parts.saved_shapes())
        finally:
            saved.close()
        held = {
            path: leaf.astype(shapes[path])
            for tree in trees.values()
            for path, leaf in flatten(tree).items()
            if leaf is not None
        }
        return params, held

    def parts(self, config: ModelConfig, mesh: Mesh) -> Parts:
        """Returns the partitions of the run's model."""
        return plan_parts(config, self.method, mesh)


def open_base(
    model: Any, seed: int, template: str | None = None, heads: Heads = LANGUAGE_MODEL
) -> Base:
    """Returns the Base of a resolved `model` section; weights are not read yet.

    Args:
        model: the section.
        seed: of a preset's random weights.
        template: chat template in place of the tokenizer's own.
        heads: what the model is to have.

    Raises:
        RequestError: a path, preset or override that cannot be honoured.
    """
    if model.path is None:
        base = from_preset(model, seed)
    else:
        path = local_directory(model.path, "model.path")
        base = base_of_run(path) if is_run(path) else from_hf(path, heads.lm)
    tokenizer = base.tokenizer
    if model.tokenizer is not None:
        tokenizer = load_tokenizer(local_directory(model.tokenizer, "model.tokenizer"))
    if tokenizer is not None and template is not None:
        tokenizer = tokenizer.with_template(template)
    if model.path is not None:
        base = overridden(base, model.overrides)
    base = with_heads(base, heads, model.path)
    config = dataclasses.replace(
        base.config,
        dtype=model.dtype,
        attention=model.attention,
        remat=model.remat,
        quantize=model.quantize,
    )
    check_vocabulary(config, tokenizer)
    base = dataclasses.replace(base, config=config, tokenizer=tokenizer)
    return with_new_tokens(base, model.add_tokens) if model.add_tokens else base


def open_run(workdir: Path, pick: str | None = None) -> Run:
    """Returns the run in a workdir; weights are not read yet.

    Args:
        workdir: the run's.
        pick: which checkpoint; see `workdir.result_step`.

    Raises:
        RequestError: there is no run, no checkpoint, or the base is not what it was.
    """
    if not is_run(workdir):
        raise RequestError("holds no run with a checkpoint", where=workdir)
    config = resolve(read_json(workdir / files.CONFIG))
    saved: RunCheckpoints = files.open_checkpoints(workdir, config, reading=True)
    try:
        step = files.result_step(saved, config, pick)
        if step is None:
            raise RequestError("the run has saved no checkpoint yet", where=workdir)
        meta = saved.meta(step)
        with saved.blamed(step):
            trained_on, method = meta["fingerprints"]["base"], method_of_spec(meta["method"])
    finally:
        saved.close()
    heads = heads_of(config.objective.name)
    base = open_base(config.model, config.seed, config.data.template, heads)
    if base.fingerprint != trained_on:
        raise RequestError(
            "the base weights are not those that the run was trained on", where=workdir
        )
    # The back end was chosen for training: for its devices and the length of its rows.
    base = dataclasses.replace(base, config=dataclasses.replace(base.config, attention="auto"))
    if (workdir / "tokenizer").is_dir():
        tokenizer = load_tokenizer(local_copy(workdir / "tokenizer"))
        base = dataclasses.replace(base, tokenizer=tokenizer)
    return Run(workdir, config, base, method, step)


def base_of_run(workdir: Path) -> Base:
    """Returns a run's result as the base of another: trained weights, adapters merged.

    The weights of a quantised run are those that it computed with.

    Raises:
        RequestError: as `open_run`; also a method that cannot be merged.
    """
    if is_remote(workdir):
        raise RequestError(
            "a run to build on must lie on disk; copy it", key="model.path", where=workdir
        )
    run = open_run(workdir)
    if not run.method.mergeable:
        raise RequestError(
            f"the run's method {run.method.name!r} cannot be merged into weights to build on",
            key="model.path",
            where=workdir,
        )
    abstract = jax.eval_shape(
        run.method.merge, plan_parts(run.base.config, run.method, cpu_mesh()).shapes
    )
    config = config_of(run.base.config, abstract)

    def load(dtype_of: Callable[[str], Any], mesh: Mesh, quantize: str = "none") -> Tree:
        held = dataclasses.replace(config, quantize=quantize)
        merged = quantized(held, with_biases(config, merged_params(run, mesh)), mesh)
        places = base_shardings(held, mesh)
        return map_paths(
            lambda path, leaf, place: jax.device_put(leaf.astype(dtype_of(path)), place),
            merged,
            places,
        )

    files_ = (workdir / "checkpoints" / str(run.step) / "model").rglob("*")
    stored = [path for path in files_ if path.is_file()]

    @functools.cache
    def digest() -> str:
        return f"{run.base.fingerprint}+{fingerprint_files(stored)}"

    return Base(config, load, run.base.tokenizer, digest, run.base.raw)


def merged_params(run: Run, mesh: Mesh) -> Tree:
    """Returns the base's parameters with the run's method merged in, computed in float32."""
    parts = run.parts(dataclasses.replace(run.base.config, dtype="float32"), mesh)
    return run.method.merge(run.load(parts, mesh))


def cpu_mesh() -> Mesh:
    """Returns a mesh of one device, for shapes."""
    from jaxtune.parallel.mesh import make_mesh

    return make_mesh({}, jax.devices()[:1])
