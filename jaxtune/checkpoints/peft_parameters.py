"""Experts and routers as PEFT adapts them: parameters, named in `target_parameters`.

Before transformers 5 they were linear modules, one an expert, named in `target_modules`; such
directories are read, too.

PEFT wraps the module that holds a parameter, once for each of its parameters that is adapted. The
wrapper of a later parameter is outside: its A and B are `experts.lora_A`, those of the one inside
`experts.base_layer.lora_A`. Parameters are in the order of the family's table.

The A of E experts is [E r, in], an expert's rows side by side. B is [out, r E], an expert's columns
E apart (`ParamWrapper` of peft.tuners.lora.layer, PEFT 0.21).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxtune.checkpoints.peft_modules import Module, parameters
from jaxtune.core.errors import RequestError
from jaxtune.models.config import ModelConfig
from jaxtune.peft.method import is_routed

A, B = "lora_A.weight", "lora_B.weight"


def parameters_of(
    fields: Mapping[str, Any], config: ModelConfig, where: Path
) -> dict[Module, list[bool]]:
    """Returns which layers of experts and routers an adapter_config.json targets.

    Raises:
        RequestError: `target_parameters` is no list of names, or one means no experts or router.
    """
    names = fields.get("target_parameters") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise RequestError("a list of names is wanted", key="target_parameters", where=where)

    def meant(parameter: str, names: Sequence[str]) -> bool:
        return any(parameter == name or parameter.endswith(f".{name}") for name in names)

    held = parameters(config)
    for name in names:
        if not any(meant(one, [name]) for module in held for one in module.names):
            raise RequestError(
                f"{name!r} names no experts or router of a {config.family} model",
                key="target_parameters",
                where=where,
            )
    found = {module: [meant(one, names) for one in module.names] for module in held}
    return {module: hits for module, hits in found.items() if any(hits)}


def check_parameters(fields: Mapping[str, Any], found: Sequence[Module], where: Path) -> None:
    """Refuses what experts and routers among `found` do not have here, nor parameters in PEFT.

    Dropout that PEFT had while experts were modules leaves what is computed alone.
    """
    routed = [module for module in found if is_routed(module.paths[0])]
    if not routed:
        return
    name, parameter = routed[0].name, any(module.holder for module in routed)
    start = fields.get("init_lora_weights")
    for key, bad in (
        ("lora_dropout", parameter and bool(fields.get("lora_dropout"))),
        ("use_dora", bool(fields.get("use_dora"))),
        ("init_lora_weights", start == "pissa"),
    ):
        if bad:
            raise RequestError(
                f"{fields[key]!r} is not supported on {name!r}", key=key, where=where
            )


def stems(adapted: Mapping[Module, Sequence[Any]]) -> dict[Module, list[str]]:
    """Returns the names that stand before `.lora_A.weight`, of each layer of each module.

    Args:
        adapted: {module: for each layer, None where it is not adapted}, in the table's order.
    """
    result = {}
    for module, layers in adapted.items():
        result[module] = list(module.names)
        if not module.holder:
            continue
        modules = list(adapted)
        later = [m for m in modules[modules.index(module) + 1 :] if m.holder == module.holder]
        for i in range(len(layers)):
            around = sum(adapted[other][i] is not None for other in later)
            result[module][i] = module.holder.format(i) + ".base_layer" * around
    return result


def read_pair(
    module: Module, stem: str, read: Callable[[str], np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Returns A [..., in, r] and B [..., r, out], led by E of experts, of a layer's tensors."""
    pairs = [[read(f"{one}.{name}") for name in (A, B)] for one in module.each(stem)]
    if "{}" in stem:
        a, b = (np.stack([pair[side].T for pair in pairs]) for side in (0, 1))
        return a, b
    [(a, b)] = pairs
    if module.experts is None:
        return a.T, b.T
    a = a.reshape(module.experts, -1, a.shape[-1])
    b = b.reshape(b.shape[0], -1, module.experts)
    return a.swapaxes(-1, -2), b.transpose(2, 1, 0)


def packed(module: Module, a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns a file's tensors of A [..., in, r] and B [..., r, out]."""
    if module.experts is None:
        return a.T, b.T
    a = a.swapaxes(-1, -2).reshape(-1, a.shape[-2])
    return a, b.transpose(2, 1, 0).reshape(b.shape[-1], -1)
