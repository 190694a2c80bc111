"""Config → the complete, checked config of a run, before anything is loaded."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from jaxtune.core.errors import RequestError, nearest
from jaxtune.recipes.schema import rules
from jaxtune.recipes.schema import values as schema_values
from jaxtune.recipes.schema.keys import ABSENT, BY_PATH, KEYS, REQUIRED, SECTIONS, Key, children

__all__ = ["Resolved", "changes", "plain", "resolve"]


class Resolved(Mapping):
    """A frozen mapping with attribute access; nested mappings are Resolved, lists are tuples.

    >>> config = Resolved({"optim": {"lr": 0.1}})
    >>> config.optim.lr, config["optim"]["lr"], "warmup_steps" in config.optim
    (0.1, 0.1, False)
    """

    __slots__ = ("_fields",)

    def __init__(self, fields: Mapping[str, Any]):
        object.__setattr__(self, "_fields", {key: _freeze(fields[key]) for key in fields})

    def __getitem__(self, key: str) -> Any:
        return self._fields[key]

    def __getattr__(self, key: str) -> Any:
        if key.startswith("_"):  # copy and pickle ask before the fields exist
            raise AttributeError(key)
        try:
            return self._fields[key]
        except KeyError:
            raise AttributeError(f"no {key!r} here; there are {list(self._fields)}") from None

    def __setattr__(self, key: str, value: Any) -> None:
        raise AttributeError("a resolved config is frozen")

    def __iter__(self) -> Iterator[str]:
        return iter(self._fields)

    def __len__(self) -> int:
        return len(self._fields)

    def __hash__(self) -> int:
        return hash(tuple(self._fields.items()))

    def __repr__(self) -> str:
        return f"Resolved({self.to_dict()!r})"

    def __reduce__(self) -> tuple[type[Resolved], tuple[dict[str, Any]]]:
        return Resolved, (self.to_dict(),)

    def to_dict(self) -> dict[str, Any]:
        """Returns plain dicts and lists, ready for JSON; `resolve` gives the same config back."""
        return {key: _thaw(value) for key, value in self._fields.items()}


def _freeze(value: Any) -> Any:
    if isinstance(value, Mapping):
        return value if isinstance(value, Resolved) else Resolved(value)
    return tuple(map(_freeze, value)) if isinstance(value, list | tuple) else value


def _thaw(value: Any) -> Any:
    if isinstance(value, Resolved):
        return value.to_dict()
    return [_thaw(item) for item in value] if isinstance(value, tuple) else value


def plain(config: Any) -> Any:
    """Returns nested dicts and lists for a ConfigDict, FrozenConfigDict, Resolved or mapping.

    The order in which keys were written is kept. A required placeholder that was never filled is
    left out.

    Raises:
        RequestError: it contains itself.
    """
    try:
        return _plain(config)
    except RecursionError:
        raise RequestError("the config contains itself, or is nested too deeply") from None


def _plain(config: Any) -> Any:
    if isinstance(config, Mapping):
        return {str(key): _plain(value) for key, value in config.items()}
    if isinstance(config, list | tuple):
        return [_plain(value) for value in config]
    if not hasattr(config, "convert_dict"):  # every ConfigDict has it; nothing else here does
        return config
    from ml_collections.config_dict import RequiredValueError

    out = {}
    # ConfigDict.items() sorts, but the first of several optim.groups wins: `_fields` keeps the
    # order that the user wrote.
    for key in config._fields:
        with contextlib.suppress(RequiredValueError):  # `resolve` says that it is missing
            out[str(key)] = _plain(config[key])
    return out


def resolve(config: Mapping[str, Any]) -> Resolved:
    """Checks a config and fills in every default.

    Args:
        config: a ConfigDict or nested mapping, with the keys of `keys.KEYS`. A None removes
            a key that the chosen method, optimizer or schedule does not use.

    Returns:
        The complete config: exactly the keys that apply, and of `total_*` and `warmup_*` the one
        that was given. Resolving it again changes nothing.

    Raises:
        RequestError: with the dotted key, for a key that is unknown, missing or not used by the
            chosen method, for a wrong type or value, and for a contradiction.
    """
    tree = plain(config)
    if not isinstance(tree, dict):
        raise RequestError(f"a config is a ConfigDict or a mapping, not {type(config).__name__}")
    given = _flatten(tree)
    selected = _selectors(given)
    given = _drop_unused(given, selected)

    values: dict[str, Any] = {}
    for key in KEYS:
        if _unmet(key, selected) is None:
            value = given.get(key.path, ABSENT)
            if value is None and key.default is ABSENT:
                value = ABSENT
            if value is not ABSENT:
                value = schema_values.check(key, value)
            elif not (key.stored and given.get("peft.init_from") is not None):
                value = _default(key, selected)
            if value is not ABSENT:
                values[key.path] = value
    values = rules.apply(values, given)
    return Resolved(_nest(values))


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Returns (dotted key, old value, new value) wherever two configs differ.

    A key that one of them lacks has the value None there; lists are compared as a whole.
    """
    out = []
    for key in dict.fromkeys([*old, *new]):
        a, b = old.get(key), new.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            out += [(f"{key}.{path}", x, y) for path, x, y in changes(a, b)]
        elif _thaw(_freeze(a)) != _thaw(_freeze(b)):
            out.append((key, a, b))
    return out


def _flatten(tree: dict[str, Any]) -> dict[str, Any]:
    """Returns {dotted key: value}; raises for names that are not in the schema."""
    given: dict[str, Any] = {}
    for name, value in tree.items():
        if name not in SECTIONS:
            _require_known("", name)
            given[name] = value
        elif isinstance(value, dict):
            for inner in value:
                _require_known(name, inner)
                given[f"{name}.{inner}"] = value[inner]
        else:
            valid = ", ".join(children(name))
            raise RequestError(f"is a section with {valid}; got {value!r}", key=name)
    return given


# What transformers, PEFT and TRL call a key.
OTHER_NAMES = {
    "model_name_or_path": "model.path",
    "gradient_checkpointing": "model.remat",
    "load_in_4bit": "model.quantize",
    "load_in_8bit": "model.quantize",
    "r": "peft.rank",
    "lora_r": "peft.rank",
    "lora_alpha": "peft.alpha",
    "lora_dropout": "peft.dropout",
    "target_modules": "peft.targets",
    "modules_to_save": "peft.train",
    "max_length": "data.seq_len",
    "max_seq_length": "data.seq_len",
    "per_device_train_batch_size": "batch_size",
    "train_batch_size": "batch_size",
    "gradient_accumulation_steps": "grad_accum",
    "max_steps": "total_steps",
    "num_train_epochs": "total_epochs",
    "learning_rate": "optim.lr",
    "lr_scheduler_type": "optim.schedule",
    "max_grad_norm": "optim.clip_norm",
    "adam_beta1": "optim.b1",
    "adam_beta2": "optim.b2",
    "save_steps": "checkpoint.every_steps",
    "eval_steps": "eval.every_steps",
    "logging_steps": "log.every_steps",
    "num_generations": "objective.samples",
    "max_completion_length": "objective.max_new_tokens",
}


def _require_known(section: str, name: str) -> None:
    path = f"{section}.{name}" if section else name
    if path in BY_PATH:
        return
    siblings = children(section)
    hint = f" (did you mean {OTHER_NAMES[name]!r}?)" if name in OTHER_NAMES else ""
    hint = hint or nearest(name, siblings)
    if not hint:  # perhaps the right name in the wrong place
        elsewhere = [key.path for key in KEYS if key.name == name] + [
            f"{key.path}[0].{inner.name}"
            for key in KEYS
            for inner in key.entry
            if inner.name == name
        ]
        hint = f" (did you mean {elsewhere[0]!r}?)" if elsewhere else ""
    raise RequestError(f"unknown key{hint}; valid here: {', '.join(siblings)}", key=path)


def _selectors(given: dict[str, Any]) -> dict[str, Any]:
    """Returns the value of each key that decides which other keys apply."""
    names = dict.fromkeys(path for key in KEYS for path, _ in key.used_by)
    chosen = {}
    for path in names:
        value = given.get(path)
        key = BY_PATH[path]
        chosen[path] = key.default if value is None else schema_values.check(key, value)
    return chosen


def _unmet(key: Key, selected: dict[str, Any]) -> str | None:
    """Returns the selector whose value rules the key out, if there is one."""
    return next((path for path, ok in key.used_by if selected[path] not in ok), None)


def _drop_unused(given: dict[str, Any], selected: dict[str, Any]) -> dict[str, Any]:
    kept = {}
    for path, value in given.items():
        selector = _unmet(BY_PATH[path], selected)
        if selector is None:
            kept[path] = value
        elif value is not None:
            need = " and ".join(
                f"{path} = {schema_values.alternatives(ok)}" for path, ok in BY_PATH[path].used_by
            )
            raise RequestError(
                f"not used by {selector} = {selected[selector]!r}; only by {need}", key=path
            )
    return kept


def _default(key: Key, selected: dict[str, Any]) -> Any:
    if key.default is REQUIRED:
        raise RequestError(f"missing: {key.doc}", key=key.path)
    for selector, _ in key.used_by:
        if selected[selector] in key.defaults:
            return key.defaults[selected[selector]]
    return key.default


def _nest(values: dict[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, value in values.items():
        section, _, name = path.rpartition(".")
        (tree.setdefault(section, {}) if section else tree)[name] = value
    return tree
