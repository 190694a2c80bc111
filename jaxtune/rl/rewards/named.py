"""Entries of `objective.rewards` → functions, by registry name, module or file."""

from __future__ import annotations

import collections
import hashlib
import importlib
import importlib.util
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxtune.core.errors import RequestError, nearest
from jaxtune.rl.rewards.registry import BUILT_IN, NEEDS_MODEL, LoadModel
from jaxtune.rl.rewards.reward import ON_REQUEST, SAMPLES, Function, Reward, signature


def build_rewards(
    entries: Sequence[Mapping[str, Any]],
    *,
    load_model: LoadModel | None = None,
    key: str = "objective.rewards",
) -> tuple[Reward, ...]:
    """Finds the functions and checks their arguments; loads no model and calls no function.

    Args:
        entries: each {function, weight, arguments, timeout, on_error}. A function is a name in
            `registry.BUILT_IN`, `module:function`, or `path/to/file.py:function`.
        load_model: directory → a model with `scores(texts) → float [n]`, for `reward_model`;
            called when the first batch is scored.
        key: of the config, named in errors.

    Returns:
        In the order of the entries. A function that is named more than once has the entry's index
        in its name: `contains-0`, `contains-1`.

    Raises:
        RequestError: a module cannot be imported, a name is missing, the signature is not that of
            a reward, or an argument is unknown or wrong.
    """
    if not entries:
        raise RequestError("is empty: give at least one {function}", key=key)
    short = [_short(entry["function"]) for entry in entries]
    counts = collections.Counter(short)
    return tuple(
        _reward(
            entry,
            name if counts[name] == 1 else f"{name}-{i}",
            load_model,
            f"{key}[{i}]",
        )
        for i, (entry, name) in enumerate(zip(entries, short, strict=True))
    )


def _short(spec: str) -> str:
    """`rewards/story.py:happy` → `happy`."""
    return spec.rpartition(":")[2]


def _reward(entry: Mapping[str, Any], name: str, load_model: LoadModel | None, key: str) -> Reward:
    spec, arguments = entry["function"], dict(entry.get("arguments") or {})
    settings = {
        "weight": entry.get("weight", 1.0),
        "timeout": entry.get("timeout"),
        "on_error": entry.get("on_error", "stop"),
        "key": key,
    }
    if ":" not in spec:
        scorer = _built_in(spec, arguments, load_model, key)
        return Reward(name, scorer.function, columns=scorer.columns, **settings)
    function = _find(spec, f"{key}.function")
    columns = _check(function, spec, arguments, key)
    return Reward(name, function, arguments, columns=columns, **settings)


def _built_in(spec: str, arguments: dict, load_model: LoadModel | None, key: str) -> Any:
    if spec not in BUILT_IN:
        raise RequestError(
            f"no reward is called {spec!r}{nearest(spec, BUILT_IN)}; valid: "
            f"{', '.join(BUILT_IN)}, module:function, path/to/file.py:function",
            key=f"{key}.function",
        )
    make = BUILT_IN[spec]
    valid, _ = signature(make)
    if spec in NEEDS_MODEL:
        del valid["load_model"]
    _check_names(arguments, valid, key)
    _require({name for name, default in valid.items() if not default} - set(arguments), key)
    if spec in NEEDS_MODEL:
        arguments["load_model"] = load_model
    try:
        return make(**arguments)
    except RequestError as error:  # the factory names the argument; the entry is known here
        part = f".{error.key}" if error.key else ""
        raise RequestError(error.message, key=f"{key}.arguments{part}") from None


def _check_names(arguments: Mapping[str, Any], valid: Mapping[str, bool], key: str) -> None:
    for name in arguments:
        if name not in valid:
            raise RequestError(
                f"unknown argument{nearest(name, valid)}; valid here: {', '.join(valid) or 'none'}",
                key=f"{key}.arguments.{name}",
            )


def _require(missing: set[str], key: str) -> None:
    for name in sorted(missing):
        raise RequestError("missing", key=f"{key}.arguments.{name}")


def _find(spec: str, key: str) -> Function:
    """Imports what stands before the last colon and returns what stands after it."""
    place, _, name = spec.rpartition(":")
    if not place or not name.isidentifier():
        raise RequestError(
            f"expected module:function or path/to/file.py:function; got {spec!r}", key=key
        )
    module = _file(place, key) if place.endswith(".py") else _module(place, key)
    if not hasattr(module, name):
        functions = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        raise RequestError(
            f"{place} has no {name!r}{nearest(name, functions)}; functions there: "
            f"{', '.join(functions) or 'none'}",
            key=key,
        )
    return getattr(module, name)


def _module(name: str, key: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(error.name + ".")):
            raise RequestError(
                f"no module {name!r} is installed; a file is named by its path, "
                f"path/to/{name.rpartition('.')[2]}.py:function",
                key=key,
            ) from None
        raise _unimportable(name, error, key) from error
    except (Exception, SystemExit) as error:
        raise _unimportable(name, error, key) from error


def _file(place: str, key: str) -> Any:
    path = Path(place).expanduser().resolve()
    if not path.is_file():
        raise RequestError(f"no file {place!r}", key=key)
    # One module for each file, known to `sys.modules`, which dataclasses and pickle look up.
    name = f"jaxtune_reward_{path.stem}_{hashlib.sha256(bytes(path)).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise _unimportable(place, error, key) from error
    return module


def _unimportable(place: str, error: BaseException, key: str) -> RequestError:
    steps = traceback.extract_tb(error.__traceback__)
    at = f"{steps[-1].filename}:{steps[-1].lineno}" if steps else None
    if isinstance(error, SyntaxError) and error.filename:
        at = f"{error.filename}:{error.lineno}"
    return RequestError(
        f"{place} cannot be imported: {type(error).__name__}: {error}", key=key, where=at
    )


def _check(function: Callable, spec: str, arguments: dict, key: str) -> tuple[str, ...]:
    """Checks a function of the user's; returns the fields that records must have."""
    expected = "a reward is called as (prompts, completions, **columns)"
    if not callable(function):
        raise RequestError(
            f"{spec} is {type(function).__name__}, not a function; {expected}",
            key=f"{key}.function",
        )
    try:
        named, takes_any = signature(function)
    except (TypeError, ValueError) as error:
        raise RequestError(f"{spec}: {error}; {expected}", key=f"{key}.function") from None
    if tuple(named)[:2] != SAMPLES:
        shown = ", ".join(named) or "no arguments"
        raise RequestError(f"{spec} takes ({shown}); {expected}", key=f"{key}.function")
    if not takes_any:
        _check_names(arguments, {n: d for n, d in named.items() if n not in SAMPLES}, key)
    for name in (*SAMPLES, *ON_REQUEST):
        if name in arguments:
            raise RequestError("is what the samples bring", key=f"{key}.arguments.{name}")
    return tuple(
        name
        for name, default in named.items()
        if not default and name not in (*SAMPLES, *ON_REQUEST, *arguments)
    )
