"""adapter_config.json of Hugging Face PEFT, to a Method and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from jaxtune.checkpoints import peft_lora
from jaxtune.checkpoints.peft_modules import (
    EMBEDDING,
    adaptable,
    all_modules,
    base_rows,
    base_shapes,
    linears,
    module_of,
    saved_rows,
    suffixes,
    tied_pair,
    within,
)
from jaxtune.checkpoints.peft_targets import check_pattern, matches, targets_of
from jaxtune.core.errors import RequestError
from jaxtune.core.tree import flatten
from jaxtune.models.config import ModelConfig
from jaxtune.models.decoder import abstract_params
from jaxtune.peft.ia3 import Ia3, scales_input
from jaxtune.peft.method import TRAINED, Method, labels, targeted
from jaxtune.peft.prefix import Prefix
from jaxtune.peft.prompt import Prompt

# Fields of any adapter that leave what it computes alone.
INERT = frozenset(
    """
    auto_mapping base_model_name_or_path inference_mode megatron_core peft_type peft_version
    revision task_type fan_in_fan_out
    """.split()  # noqa: SIM905 - a paragraph reads better than a list
)
LANGUAGE_MODEL, CLASSIFIER = "CAUSAL_LM", "SEQ_CLS"  # of `task_type`
TARGETS = ("target_modules", "exclude_modules", "modules_to_save")
USED: dict[str, tuple[str, ...]] = {
    "LORA": (
        *TARGETS,
        "layers_to_transform",
        "layers_pattern",
        "target_parameters",
        "r",
        "rank_pattern",
        "lora_alpha",
        "alpha_pattern",
        "lora_dropout",
        "bias",
        "use_rslora",
        "use_dora",
        "init_lora_weights",
        "loftq_config",  # read only together with init_lora_weights="loftq"
        "eva_config",  # only says how A was started
        "qalora_group_size",  # read only together with use_qalora
    ),
    "IA3": (*TARGETS, "feedforward_modules", "init_ia3_weights"),
    "PROMPT_TUNING": (
        "num_virtual_tokens",
        "num_transformer_submodules",
        "token_dim",
        "num_attention_heads",
        "num_layers",
        "prompt_tuning_init",
        "prompt_tuning_init_text",
        "tokenizer_name_or_path",
        "tokenizer_kwargs",
    ),
    # a projected prefix is saved as what the projection gives, so the projection does not matter
    "PREFIX_TUNING": (
        "num_virtual_tokens",
        "num_transformer_submodules",
        "token_dim",
        "num_attention_heads",
        "num_layers",
        "encoder_hidden_size",
        "prefix_projection",
        "init_weights",
    ),
}


def method_of(
    fields: Mapping[str, Any], config: ModelConfig, where: Path, to_train: bool = False
) -> Method:
    """Returns the Method that an adapter_config.json describes on a model.

    Args:
        fields: the parsed file.
        config: of the base.
        where: the file, for messages.
        to_train: refuse what only computes as in PEFT, but would not train so.

    Raises:
        RequestError: a method or a setting that this version does not have, by name.
    """
    kind = fields.get("peft_type")
    if not isinstance(kind, str) or kind not in USED:
        raise RequestError(
            f"{kind!r} is not supported; supported are {', '.join(USED)}",
            key="peft_type",
            where=where,
        )
    known = (LANGUAGE_MODEL,) if config.lm_head else (LANGUAGE_MODEL, CLASSIFIER)
    if fields.get("task_type") not in (None, *known):
        raise RequestError(
            f"{fields['task_type']!r} is not supported on this base; only "
            f"{' and '.join(map(repr, known))} is",
            key="task_type",
            where=where,
        )
    refuse_unused(fields, (*INERT, *USED[kind]), where)
    if kind in ("LORA", "IA3"):
        if needs_own_head(fields, config):
            raise RequestError(
                "it replaces or adapts one of embedding and head, which are tied here; untie them "
                "with model.overrides.tie_embeddings=False",
                key="modules_to_save" if fields.get("modules_to_save") else "target_modules",
                where=where,
            )
        found = peft_lora.method_of(fields, config, where) if kind == "LORA" else None
        found = found or ia3(fields, config, where, to_train)
        train = tuple(saved_rows(saved_names(fields, where), config, where))
        return dataclasses.replace(found, train=train)
    if fields.get("num_transformer_submodules") not in (None, 1):
        raise RequestError("only 1 is supported", key="num_transformer_submodules", where=where)
    tokens = count(fields, "num_virtual_tokens", where)
    return Prompt(num_tokens=tokens) if kind == "PROMPT_TUNING" else Prefix(num_tokens=tokens)


def refuse_unused(fields: Mapping[str, Any], known: Iterable[str], where: Path) -> None:
    """Refuses a setting that nothing here reads, unless it is switched off."""
    for name, value in fields.items():
        if name not in known and value not in (None, False, "", [], {}):
            raise RequestError(
                f"{str(value)[:60]!r} is not supported in this version; only its default is",
                key=name,
                where=where,
            )


def count(fields: Mapping[str, Any], name: str, where: Path) -> int:
    """Returns a positive integer field."""
    value = fields.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise RequestError(f"a positive integer is wanted, not {value!r}", key=name, where=where)
    return value


def saved_names(fields: Mapping[str, Any], where: Path) -> list[str]:
    """Returns the names in `modules_to_save`."""
    names = fields.get("modules_to_save") or []
    if fields.get("task_type") == CLASSIFIER and isinstance(names, list):
        # what PEFT calls the heads of all classifiers; those here have a `score`
        names = [name for name in names if name != "classifier"]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise RequestError("a list of names is wanted", key="modules_to_save", where=where)
    return names


def needs_own_head(fields: Mapping[str, Any], config: ModelConfig) -> bool:
    """Tells whether an adapter parts the head of a tied model from its embedding.

    PEFT copies a module that it saves, and adapts a head without its embedding; either way the
    weights are tied no longer.
    """
    if not config.tie_embeddings:
        return False
    pair, saved = tied_pair(config), fields.get("modules_to_save") or []
    targets = fields.get("target_modules") or []
    if any(module.endswith(name) for module in pair for name in saved if isinstance(name, str)):
        return True
    if isinstance(targets, str) and targets.lower() == "all-linear":
        return False
    if not isinstance(targets, str | list):
        return False
    return matches(targets, pair[1])


def ia3(fields: Mapping[str, Any], config: ModelConfig, where: Path, to_train: bool) -> Ia3:
    """Returns the Ia3 of an IA3 config.

    Raises:
        RequestError: scales on another side of a layer than ours; layers without a scale, which
            would be trained too.
    """
    targets = targets_of(fields, config, where, linears(config))
    pattern = fields.get("feedforward_modules") or []
    check_pattern(pattern, "feedforward_modules", where)
    names = []
    for module, hits in targets.items():
        on_input = matches(pattern, module.names[0])
        if any(on_input != scales_input(path) for path in module.paths):
            side = "input" if on_input else "output"
            raise RequestError(
                f"a scale on the {side} of {module.paths[0].rsplit('/', 1)[-1]} is not supported",
                key="feedforward_modules",
                where=where,
            )
        if to_train and not all(hits):
            raise RequestError(
                f"{module.name!r} is scaled in some layers only; training would scale it in all",
                key="target_modules",
                where=where,
            )
        names += [path.rsplit("/", 1)[-1] for path in module.paths]
    return Ia3(targets=tuple(names))


# -- out ------------------------------------------------------------------------------------------


def virtual_fields(method: Prompt | Prefix, config: ModelConfig) -> dict[str, Any]:
    """Returns the fields of prompt and prefix tuning."""
    prompt = isinstance(method, Prompt)
    # a prefix is keys and values, so its heads and width are theirs
    width = config.hidden_size if prompt else config.num_kv_heads * config.head_dim
    virtual = {
        "num_virtual_tokens": method.num_tokens,
        "num_transformer_submodules": 1,
        "num_layers": config.num_layers,
        "num_attention_heads": config.num_heads if prompt else config.num_kv_heads,
        "token_dim": width,
    }
    if prompt:
        return virtual | {"peft_type": "PROMPT_TUNING", "prompt_tuning_init": "RANDOM"}
    return virtual | {"peft_type": "PREFIX_TUNING", "prefix_projection": False}


def ia3_fields(config: ModelConfig, flat: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of IA3 whose scales are in `flat`, {path: leaf}."""
    ends = suffixes([module.name for module in linears(config)], all_modules(config))
    held = [m for m in linears(config) if any(f"{path}/ia3/scale" in flat for path in m.paths)]
    return {
        "peft_type": "IA3",
        "target_modules": sorted(ends[module.name] for module in held),
        "feedforward_modules": sorted(
            ends[module.name] for module in held if scales_input(module.paths[0])
        ),
        "fan_in_fan_out": any(module.conv1d for module in held),
        "init_ia3_weights": True,
    }


def task_of(config: ModelConfig) -> str:
    """Returns the `task_type` of an adapter on a base of this config."""
    return LANGUAGE_MODEL if config.lm_head else CLASSIFIER


def modules_to_save(config: ModelConfig, paths: Iterable[str]) -> list[str] | None:
    """Returns the names of the modules that hold trained base parameters; None for none.

    Of a tied pair both are named: PEFT unties what it saves.
    """
    rows, paths = base_rows(config), list(paths)
    modules = list(dict.fromkeys(module_of(rows[path].name) for path in paths))
    if config.tie_embeddings and EMBEDDING in paths:
        modules.append(tied_pair(config)[1])
    ends = suffixes(modules, all_modules(config), separator="")
    return sorted(ends[module] for module in modules) or None


def refuse_overlap(method: Method, config: ModelConfig) -> None:
    """Refuses to save a module whole that has an adapter as well, in it or on it, as PEFT does."""
    rows = base_rows(config)
    whole = {path: module_of(rows[path].name) for path in labelled(method, config)}
    for module in adaptable(config):
        if not any(targeted(method.targets, path) for path in module.paths):
            continue
        path = next((path for path, name in whole.items() if within(module.name, name)), None)
        if path is not None:
            raise RequestError(
                f"{path!r} is trained, so that {whole[path]!r} is saved whole, and has an adapter "
                "as well, which PEFT cannot hold",
                key="format",
            )


def labelled(method: Method, config: ModelConfig) -> list[str]:
    """Returns the paths of the base's parameters that a method trains."""
    kinds = flatten(labels(method, abstract_params(config, method)))
    return [path for path in base_shapes(config) if kinds[path] == TRAINED]
