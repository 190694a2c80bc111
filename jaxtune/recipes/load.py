"""`jaxtune.load`: a model of a Hugging Face directory, with an adapter, or of a run's workdir."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
from jax.sharding import Mesh

from jaxtune.checkpoints import adapters
from jaxtune.checkpoints.hub import local_directory
from jaxtune.core.errors import RequestError
from jaxtune.core.quantize import KINDS, dense_tree
from jaxtune.core.tree import flatten, unflatten
from jaxtune.parallel.mesh import make_mesh
from jaxtune.peft.method import SCORE, Method
from jaxtune.recipes.adapters import Adapter, Stand
from jaxtune.recipes.assemble import load_parts, plan_parts
from jaxtune.recipes.base import from_hf, is_run, quantized
from jaxtune.recipes.heads import REWARD_MODEL, with_heads
from jaxtune.recipes.language_model import LanguageModel
from jaxtune.recipes.runs import open_run

DTYPES = ("bfloat16", "float32")
DEFAULT = "default"  # the name of the adapter that a model was loaded with


def load(
    path: str | Path,
    adapter: str | Path | None = None,
    dtype: str = "bfloat16",
    quantize: str | None = None,
    mesh: Mesh | None = None,
    pick: str | None = None,
) -> LanguageModel:
    """Loads a model for use.

    Args:
        path: Hugging Face directory, `hub:ORG/NAME`, or the workdir of a run (its best checkpoint
            if it keeps one, else the newest).
        adapter: PEFT directory on top of it, or one of format "jaxtune"; it is then called
            "default" among `adapters`.
        dtype: "bfloat16" or "float32", of weights and computation; an adapter's own weights stay
            float32.
        quantize: "none", "int8" or "nf4", of the kernels of the blocks; None: as the run was
            trained, or "none".
        mesh: devices; one device by default.
        pick: of a run that measures what it retains, which checkpoint: "target", "retention", or
            "knee", between the two.

    Raises:
        RequestError: a path or file that cannot be read, by name.
    """
    path = local_directory(path)
    if dtype not in DTYPES:
        raise RequestError(f"{dtype!r} is not one of {', '.join(DTYPES)}", key="dtype")
    if quantize not in (None, "none", *KINDS):
        raise RequestError(f"{quantize!r} is not one of none, {', '.join(KINDS)}", key="quantize")
    mesh = mesh or make_mesh({}, jax.devices()[:1])
    if is_run(path):
        if adapter is not None:
            raise RequestError(
                "a run has its own adapter; give the base's directory", key="adapter"
            )
        return load_run(path, dtype, mesh, quantize, pick)
    if pick is not None:
        raise RequestError("only a run has checkpoints to pick from", key="pick", where=path)
    base = from_hf(path)
    if adapter is not None and adapters.is_scorer(adapter):
        base = with_heads(base, REWARD_MODEL, path)
    config = dataclasses.replace(base.config, dtype=dtype, quantize=quantize or "none")
    parts = plan_parts(config, Method(), mesh)
    params = load_parts(base, parts, mesh, 0, None)
    lm = LanguageModel(base.tokenizer, config, params, Method(), mesh, str(path), base.raw)
    return lm if adapter is None else lm.add_adapter(DEFAULT, adapter).use(DEFAULT)


def load_run(
    workdir: Path, dtype: str, mesh: Mesh, quantize: str | None, pick: str | None
) -> LanguageModel:
    """Loads a run's result; what it added to its base is the adapter "default"."""
    run = open_run(workdir, pick)
    config = dataclasses.replace(run.base.config, dtype=dtype, remat="none")
    full = run.method.name == "full"
    if quantize is not None and not full:
        config = dataclasses.replace(config, quantize=quantize)
    parts = run.parts(config, mesh)
    source = str(run.config.model.path or workdir)
    base, held = run.load_apart(parts, mesh)
    if config.lm_head and config.score_head:  # a value head, which only training uses
        config = dataclasses.replace(config, score_head=False)
        parts = run.parts(config, mesh)
        base, held = ({p: x for p, x in tree.items() if p != SCORE} for tree in (base, held))
    if full:  # its base is what it made
        params = {path: (base | held)[path] for path in flatten(parts.shapes)}
        stand = None
        if quantize is not None and config.quantize != quantize:
            config = dataclasses.replace(config, quantize=quantize)
            whole = dense_tree(unflatten(params), config.compute_dtype)
            params = flatten(quantized(config, whole, mesh))
    else:
        params = base
        stand = Stand(config, base, {DEFAULT: Adapter(run.method, held)})
    lm = LanguageModel(
        run.base.tokenizer,
        config,
        unflatten(params),
        Method() if stand else run.method,
        mesh,
        source,
        run.base.raw,
        stand,
    )
    return lm.use(DEFAULT) if stand else lm
