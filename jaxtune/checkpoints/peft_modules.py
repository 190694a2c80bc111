"""The modules of a Hugging Face model as PEFT names them, from the family's weight table."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from jaxtune.core.errors import RequestError
from jaxtune.core.tree import flatten
from jaxtune.models.config import ModelConfig
from jaxtune.models.decoder import abstract_params
from jaxtune.models.families import registry
from jaxtune.models.families.table import Part, Weight
from jaxtune.peft.lora import Lora
from jaxtune.peft.method import Method, is_routed

EMBEDDING, HEAD = "embed/embedding", "lm_head/kernel"
PREFIX = "base_model.model."  # of every name in an adapter's file, but for prompts


@dataclasses.dataclass(frozen=True)
class Module:
    """A linear module of theirs, which holds one of our linear layers or several side by side.

    Or a parameter that holds experts or their router.

    Attributes:
        name: with `{}` for the layer's number, and a second one where experts are modules.
        layers: how many there are; None for one outside the blocks.
        paths: of our linear layers.
        parts: where the outputs of each stand, None where it is alone.
        d_in, widths: its inputs, and the outputs of each of ours.
        conv1d: its weight is [in, out], as GPT-2's.
        holder: of a parameter, the name of the module that it belongs to.
        experts: how many there are in it.
    """

    name: str
    layers: int | None
    paths: tuple[str, ...]
    parts: tuple[Part | None, ...]
    d_in: int
    widths: tuple[int, ...]
    conv1d: bool
    holder: str = ""
    experts: int | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The name of each layer's module; an expert's number stays `{}`."""
        if self.layers is None:
            return (self.name,)
        return tuple(self.name.replace("{}", str(i), 1) for i in range(self.layers))

    def each(self, name: str) -> list[str]:
        """Returns the modules that one of `names` stands for: one, or one an expert."""
        return [name.format(e) for e in range(self.experts or 1)] if "{}" in name else [name]

    @property
    def lead(self) -> tuple[int, ...]:
        """What comes before [in, out] in a layer."""
        return () if self.experts is None else (self.experts,)

    @property
    def d_out(self) -> int:
        """All outputs."""
        part = self.parts[0]
        return self.widths[0] if part is None else part.whole(self.widths[0])

    def places(self, number: int) -> Any:
        """Returns where the outputs of our linear layer `number` stand among all."""
        part = self.parts[number]
        return slice(None) if part is None else part.places(0, self.widths[number])


def base_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Returns {path: shape} of a base model's parameters."""
    return {path: leaf.shape for path, leaf in flatten(abstract_params(config, Method())).items()}


def base_rows(config: ModelConfig) -> dict[str, Weight]:
    """Returns {path: row of the family's modules} of a base model's parameters."""
    shapes = base_shapes(config)
    table = registry.family(config.family).modules(config)
    return {weight.path: weight for weight in table if weight.path in shapes}


@functools.cache
def linears(config: ModelConfig) -> tuple[Module, ...]:
    """Returns the linear modules that have a slot for a method, in the order of the table."""
    return tuple(module for module in adaptable(config) if not module.holder)


@functools.cache
def parameters(config: ModelConfig) -> tuple[Module, ...]:
    """Returns the parameters that hold experts or their routers, in the order of the table."""
    return tuple(module for module in adaptable(config) if module.holder)


@functools.cache
def expert_modules(config: ModelConfig) -> tuple[Module, ...]:
    """Returns experts and routers as transformers 4 had them: a linear module each.

    That is how the family's files name them; none where files hold them stacked.
    """
    shapes = base_shapes(config)
    table = [w for w in registry.family(config.family).table(config) if w.path in shapes]
    if not any(weight.stacked == 2 for weight in table):
        return ()
    return tuple(
        Module(
            module_of(weight.name),
            config.num_layers,
            (weight.path.removesuffix("/kernel"),),
            (None,),
            shapes[weight.path][-2],
            shapes[weight.path][-1:],
            False,
            experts=config.experts.count if weight.stacked == 2 else None,
        )
        for weight in table
        if is_routed(weight.path) and weight.path.endswith("/kernel")
    )


@functools.cache
def adaptable(config: ModelConfig) -> tuple[Module, ...]:
    """Returns all that LoRA can adapt, in the order of the table."""
    everywhere = abstract_params(config, Lora(rank=1, targets=".*"))
    slotted = [p.removesuffix("/lora/a") for p in flatten(everywhere) if p.endswith("/lora/a")]
    shapes, found = base_shapes(config), {}
    for path, weight in base_rows(config).items():
        if path.removesuffix("/kernel") in slotted:
            name = weight.name if is_routed(path) else module_of(weight.name)
            found.setdefault(name, []).append((path, weight))
    result = []
    for name, rows in found.items():
        shape, routed = shapes[rows[0][0]], is_routed(rows[0][0])
        result.append(
            Module(
                name,
                shape[0] if "{}" in name else None,
                tuple(path.removesuffix("/kernel") for path, _ in rows),
                tuple(weight.part for _, weight in rows),
                shape[-2],
                tuple(shapes[path][-1] for path, _ in rows),
                not rows[0][1].transpose and not routed,
                module_of(name) if routed else "",
                shape[-3] if routed and "/experts/" in rows[0][0] else None,
            )
        )
    return tuple(result)


def module_of(tensor: str) -> str:
    """Returns the name of the module that a tensor belongs to."""
    return tensor.rpartition(".")[0]


def within(module: str, other: str) -> bool:
    """Tells whether a module is another or inside it.

    >>> within("h.0.attn.q_proj", "h.0.attn"), within("h.0.attn_norm", "h.0.attn")
    (True, False)
    """
    return f"{module}.".startswith(f"{other}.")


def tied_pair(config: ModelConfig) -> tuple[str, str]:
    """Returns the names of the embedding's and the head's modules, tied or not."""
    table = {weight.path: weight for weight in registry.family(config.family).modules(config)}
    return module_of(table[EMBEDDING].name), module_of(table[HEAD].name)


def all_modules(config: ModelConfig) -> tuple[str, ...]:
    """Returns the names of all modules with weights, `{}` for the layer's number."""
    table = registry.family(config.family).modules(config)
    return tuple(dict.fromkeys(module_of(weight.name) for weight in table))


# -- what PEFT's settings mean --------------------------------------------------------------------


def suffixes(modules: Iterable[str], others: Iterable[str], separator: str = ".") -> dict[str, str]:
    """Returns {module: the shortest end of its name that means no other}, for all of its layers.

    Args:
        modules: names with `{}` for the layer's number.
        others: all names that must not be meant.
        separator: what PEFT wants before a listed name: "." in `target_modules`, nothing in
            `modules_to_save`.

    >>> suffixes(["h.{}.attn.c_proj"], ["h.{}.attn.c_proj", "h.{}.mlp.c_proj"])
    {'h.{}.attn.c_proj': 'attn.c_proj'}
    """
    others = tuple(others)
    result = {}
    for module in modules:
        words = module.rsplit("{}.", 1)[-1].split(".")
        for start in range(len(words) - 1, -1, -1):
            end = ".".join(words[start:])
            rest = [o for o in others if o != module]
            if not any(o == end or o.endswith(separator + end) for o in rest):
                break
        result[module] = end
    return result


def saved_rows(
    names: Iterable[str], config: ModelConfig, where: Path
) -> dict[str, tuple[Weight, tuple[int, ...]]]:
    """Returns {path: (row, shape)} of the parameters that `modules_to_save` replaces.

    As `_set_trainable` of peft.utils.other: a module is meant if its name ends so, with everything
    that it contains.

    Raises:
        RequestError: a name that means nothing, or modules in some of the layers only.
    """
    names, shapes, found = list(names), base_shapes(config), {}
    used: set[str] = set()
    for path, row in base_rows(config).items():
        hits = []
        for tensor in row.names(shapes[path]):
            words = tensor.split(".")
            above = [".".join(words[:stop]) for stop in range(1, len(words))]
            meant = {n for n in names if any(module.endswith(n) for module in above)}
            used |= meant
            hits.append(bool(meant))
        if any(hits) and not all(hits):
            raise RequestError(
                f"{row.name!r} is saved in some layers only, which this version cannot hold",
                key="modules_to_save",
                where=where,
            )
        if any(hits):
            found[path] = (row, shapes[path])
    dead = [name for name in names if name not in used]
    if dead:
        hint = "; its head is tied to the embedding" if config.tie_embeddings else ""
        raise RequestError(
            f"{dead[0]!r} names no module of a {config.family} model{hint}",
            key="modules_to_save",
            where=where,
        )
    return found


def into_leaf(row: Weight, tensors: list[np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
    """Returns the parameter, float32, that the tensors of a row hold."""
    out = np.empty(shape, np.float32)
    for at, tensor in zip(row.indices(shape), tensors, strict=True):
        whole = row.turned(tensor)
        out[at] = whole if row.part is None else whole[..., row.part.places(0, shape[-1])]
    return out
