"""Which modules an adapter_config.json targets, as PEFT matches names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from jaxtune.checkpoints.peft_modules import Module, tied_pair
from jaxtune.core.errors import RequestError
from jaxtune.models.config import ModelConfig
from jaxtune.peft.method import is_routed


def matches(pattern: Any, module: str) -> bool:
    """Tells whether a regex or a list of names of PEFT means a module.

    As `check_target_module_exists` of peft.tuners.tuners_utils: a regex matches the whole name, a
    listed name is the module's, or the end of it behind a dot.
    """
    if isinstance(pattern, str):
        return re.fullmatch(pattern, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in pattern)


def check_pattern(pattern: Any, name: str, where: Path) -> None:
    """Refuses what is neither a regex nor a list of names."""
    if isinstance(pattern, str):
        try:
            re.compile(pattern)
        except re.error as error:
            raise RequestError(f"not a regex: {error}", key=name, where=where) from error
    elif not isinstance(pattern, list) or not all(isinstance(item, str) for item in pattern):
        raise RequestError("a regex or a list of names is wanted", key=name, where=where)


def targets_of(
    fields: Mapping[str, Any], config: ModelConfig, where: Path, among: Iterable[Module]
) -> dict[Module, list[bool]]:
    """Returns which layers of which modules an adapter_config.json targets.

    Args:
        fields: the parsed file.
        config: of the base.
        where: the file, for messages.
        among: the modules that there are.

    Raises:
        RequestError: a setting that is no regex or list, an embedding, or nothing at all.
    """
    wanted, excluded = fields.get("target_modules"), fields.get("exclude_modules")
    if not wanted and fields.get("target_parameters"):
        return {}
    if not wanted:
        raise RequestError("the field is missing", key="target_modules", where=where)
    check_pattern(wanted, "target_modules", where)
    if excluded:
        check_pattern(excluded, "exclude_modules", where)
    everything = isinstance(wanted, str) and wanted.lower() == "all-linear"
    saved, chosen = fields.get("modules_to_save") or [], layer_filter(fields, where)
    for name in saved:
        check_pattern(name, "modules_to_save", where)
    embedding, head = tied_pair(config)

    def hit(module: str) -> bool:
        if excluded and matches(excluded, module):
            return False
        if any(re.match(rf"(^|.*\.){name}($|\..*)", module) for name in saved):
            return False
        if everything:
            return module != head
        return matches(wanted, module) and (isinstance(wanted, str) or chosen(module))

    if not everything and hit(embedding):
        raise RequestError(
            "adapters on the embedding are not supported", key="target_modules", where=where
        )
    found = {}
    for module in among:
        if everything and is_routed(module.paths[0]):
            continue
        hits = [[hit(one) for one in module.each(name)] for name in module.names]
        if any(len(set(layer)) > 1 for layer in hits):
            raise RequestError(
                f"{module.name!r} is adapted for some experts only, which is not supported",
                key="target_modules",
                where=where,
            )
        found[module] = [layer[0] for layer in hits]
    found = {module: hits for module, hits in found.items() if any(hits)}
    if not found and config.tie_embeddings and hit(head):
        raise RequestError(
            "the head is tied to the embedding; untie it with model.overrides.tie_embeddings=False",
            key="target_modules",
            where=where,
        )
    if not found and not fields.get("target_parameters"):
        raise RequestError(
            f"{wanted!r} names no linear layer of a {config.family} model",
            key="target_modules",
            where=where,
        )
    return found


def layer_filter(fields: Mapping[str, Any], where: Path) -> Any:
    """Returns the test of `layers_to_transform` and `layers_pattern` on a module's name."""
    layers, patterns = fields.get("layers_to_transform"), fields.get("layers_pattern") or []
    if layers is None or layers == []:
        return lambda module: True
    layers = [layers] if isinstance(layers, int) else layers
    if not isinstance(layers, list) or not all(isinstance(layer, int) for layer in layers):
        raise RequestError("a list of numbers is wanted", key="layers_to_transform", where=where)
    names = [patterns] if isinstance(patterns, str) else patterns
    for name in names:
        check_pattern(name, "layers_pattern", where)
    expressions = [rf"(?:^|.*?\.){name}\.(\d+)\." for name in names] or [r".*?\.[^.]*\.(\d+)\."]

    def chosen(module: str) -> bool:
        found = next((m for e in expressions if (m := re.match(e, module))), None)
        return found is not None and int(found[1]) in layers

    return chosen


def pattern_value(pattern: Mapping[str, Any], module: str, default: Any) -> Any:
    """Returns the first entry of `rank_pattern` or `alpha_pattern` whose key means the module."""
    for key, value in pattern.items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default
