"""Config → method."""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxtune.core.errors import RequestError
from jaxtune.core.tree import flatten
from jaxtune.data.tokenizer import Tokenizer
from jaxtune.models.config import ModelConfig
from jaxtune.models.decoder import abstract_params
from jaxtune.peft.lora import Lora
from jaxtune.peft.method import SCORE, Method, is_routed, targeted
from jaxtune.peft.registry import METHODS
from jaxtune.recipes.schema.keys import KEYS
from jaxtune.recipes.schema.values import unquoted


def make_method(peft: Any, tokenizer: Tokenizer | None) -> Method:
    """Returns the Method of a resolved `peft` section.

    Args:
        peft: the section.
        tokenizer: for `init_text`.

    Raises:
        RequestError: `init_text` without a tokenizer.
    """
    cls = METHODS[peft.method]
    names = {field.name for field in dataclasses.fields(cls)}
    values = {name: value for name, value in peft.items() if name in names}
    if peft.get("init") == "text":
        if tokenizer is None:
            raise RequestError("needs a tokenizer; set model.tokenizer", key="peft.init_text")
        values["init_ids"] = tuple(tokenizer.encode(peft.init_text, special=False))
    return cls(**values)


def check_stored(peft: Any, found: Method, config: ModelConfig) -> None:
    """Raises RequestError if a `peft` section gives a setting that its directory has otherwise.

    Args:
        peft: the section, with `init_from`.
        found: the method in the directory.
        config: of the base.
    """
    for key in KEYS:
        if not key.stored or not key.path.startswith("peft.") or key.name not in peft:
            continue
        given, held = peft[key.name], getattr(found, key.name)
        if key.name == "targets":
            other = dataclasses.replace(found, targets=given)
            same = adapted(other, config) == adapted(found, config)
        else:
            same = given == held
        if not same:
            raise RequestError(
                f"is {given!r}, but the adapter there has {held!r}; leave the key out, or give "
                "the adapter's",
                key=key.path,
                where=peft.init_from,
            )


def adapted(method: Method, config: ModelConfig) -> set[str]:
    """Returns the paths of a model with the method."""
    return set(flatten(abstract_params(config, method)))


def check_width(method: Method, config: ModelConfig) -> None:
    """Raises RequestError if a rank or bottleneck is wider than what it adapts can use.

    A rank beyond the smaller side of every adapted layer adds nothing, and a slip of the pen would
    fill the memory. A bottleneck may be wider than the model, but not without bounds.
    """
    width = getattr(method, "bottleneck", 0)
    if width > 16 * config.hidden_size:
        raise RequestError(
            f"{width} is more than 16 times the model's width, {config.hidden_size}",
            key="peft.bottleneck",
        )
    sides = [
        min(leaf.shape[-2:])
        for path, leaf in flatten(abstract_params(config, Method())).items()
        if path.endswith("/kernel")
        and targeted(getattr(method, "targets", "all-linear"), path.removesuffix("/kernel"))
    ]
    rank, limit = getattr(method, "rank", 0), max(sides, default=0)
    if rank > limit > 0:
        raise RequestError(
            f"{rank} is more than {limit}, the smaller side of the largest layer that it adapts",
            key="peft.rank",
        )


def check_targets(method: Method, config: ModelConfig) -> None:
    """Raises RequestError unless each target of the method names a layer that it can adapt."""
    targets = getattr(method, "targets", None)
    if targets is None or targets == "all-linear":
        return
    base = flatten(abstract_params(config.unquantized, Method()))
    kernels = [
        path.removesuffix("/kernel") for path in base if path.endswith("/kernel") and path != SCORE
    ]
    routed = [path for path in kernels if is_routed(path)]
    reached = isinstance(method, Lora)
    if reached:
        check_routed(method, [path for path in routed if targeted(targets, path)])
    linears = [path for path in kernels if reached or path not in routed]
    names = [targets] if isinstance(targets, str) else targets
    for name in names:
        chosen = name if isinstance(targets, str) else (name,)
        if name == "lm_head" and config.tie_embeddings:
            raise RequestError(
                "'lm_head' is tied to the embedding, so adapting it would adapt the input too; "
                "load with model.overrides.tie_embeddings=False, or leave it out",
                key="peft.targets",
            )
        if not any(targeted(chosen, path) for path in linears):
            short = sorted({path.rsplit("/", 1)[-1] for path in linears})
            raise RequestError(
                f"{name!r} is no linear layer of this model; there are {', '.join(short)}"
                f"{unquoted(name)}",
                key="peft.targets",
            )


def check_routed(method: Lora, paths: list[str]) -> None:
    """Raises RequestError for what LoRA has in linear layers and not in experts or router."""
    if not paths:
        return
    name = paths[0].removeprefix("blocks/mlp/")
    if method.variant in ("dora", "pissa"):
        raise RequestError(
            f"{method.variant!r} does not adapt {name!r}; use 'lora' or 'rslora', or targets "
            "without experts and router",
            key="peft.variant",
        )
    if method.dropout:
        raise RequestError(
            f"must be 0 where {name!r} is adapted: its A and B are part of the kernel",
            key="peft.dropout",
        )
