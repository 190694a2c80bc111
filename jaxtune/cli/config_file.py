"""Loads `--config=FILE[:ARG]` and applies `--config.key=value`.

The syntax is that of ml_collections' config flags. The file is loaded here rather than by
`config_flags`, which hides a failing file until its first use and takes a flag's type from the
file's value; here an error names the file's line, and types come from the schema.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import importlib.util
import inspect
import json
import pathlib
import traceback
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from jaxtune.core.errors import RequestError, nearest
from jaxtune.recipes.schema.overrides import assign, parse
from jaxtune.recipes.schema.resolve import Resolved, plain, resolve


@dataclasses.dataclass(frozen=True)
class ConfigFile:
    """A config as the file and the flags give it, not yet checked.

    Attributes:
        path: the file.
        raw: nested dicts and lists.
        flags: dotted keys that were set on the command line.
        get_hyper: the file's own, or None.
        argument: what stands after the colon of `--config=FILE:ARG`, or None.
    """

    path: pathlib.Path
    raw: dict[str, Any]
    flags: tuple[str, ...]
    get_hyper: Callable[..., Any] | None = None
    argument: str | None = None

    def resolve(self) -> Resolved:
        """Returns the complete config; an error names the file's line, or the flag."""
        with self.located():
            return resolve(self.raw)

    def hyper(self, helper: Any) -> list[dict[str, Any]]:
        """Returns the trials of the file's get_hyper."""
        with _blamed(self.path):
            return self.get_hyper(helper)

    @contextlib.contextmanager
    def located(self) -> Iterator[None]:
        """Adds the file and line to a RequestError that names a key of this config."""
        try:
            yield
        except RequestError as error:
            if error.where is not None or not _is_config_key(error.key):
                raise
            where: str | None = str(self.path)
            if any(_covers(flag, error.key) for flag in self.flags):
                where = f"--config.{error.key}"
                raise RequestError(error.message, where=where) from None
            line = _line_of(self.path, error.key)
            where = f"{where}:{line}" if line else where
            raise RequestError(error.message, key=error.key, where=where) from None


def load(spec: str, overrides: Sequence[tuple[str, str]]) -> ConfigFile:
    """Loads a config file and applies the overrides in order.

    Args:
        spec: `FILE` or `FILE:ARG`; a Python file with `get_config`, or a run's config.json.
        overrides: (dotted key, text) pairs.

    Raises:
        RequestError: with FILE:LINE where the file fails.
    """
    name, colon, argument = spec.partition(":")
    path = pathlib.Path(name)
    if not path.is_file():
        raise RequestError(_absent(path), where=path)
    get_hyper = None
    if path.suffix == ".json":
        raw = _read_json(path)
    elif path.suffix == ".py":
        module = _run(path)
        get_hyper = getattr(module, "get_hyper", None)
        with _blamed(path):
            raw = plain(_call(path, module, [argument] if colon else []))
    else:
        raise RequestError(
            "a config is a Python file with get_config(), or a config.json", where=path
        )
    if not isinstance(raw, dict):
        raise RequestError(
            f"get_config() returned {type(raw).__name__}; expected a ConfigDict", where=path
        )
    for key, text in overrides:
        assign(raw, key, parse(key, text))
    flags = tuple(key for key, _ in overrides)
    return ConfigFile(path, raw, flags, get_hyper, argument if colon else None)


def _absent(path: pathlib.Path) -> str:
    if path.is_dir():
        return "is a directory; a config is a Python file"
    siblings = [p.name for p in path.parent.glob("*.py")] if path.parent.is_dir() else []
    return f"no such config file{nearest(path.name, siblings)}"


def _read_json(path: pathlib.Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise RequestError(f"is not JSON: {error.msg}", where=f"{path}:{error.lineno}") from None
    except RecursionError:
        raise RequestError("is nested too deeply", where=path) from None
    except UnicodeDecodeError as error:
        raise RequestError(f"is not UTF-8: {error.reason}", where=path) from None
    except ValueError as error:  # an endless number
        raise RequestError(f"is not JSON: {error}", where=path) from None


def _run(path: pathlib.Path) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location("jaxtune_config", path)
    module = importlib.util.module_from_spec(spec)
    with _blamed(path):
        spec.loader.exec_module(module)
    return module


def _call(path: pathlib.Path, module: types.ModuleType, arguments: list[str]) -> Any:
    get_config = getattr(module, "get_config", None)
    if not callable(get_config):
        raise RequestError("has no get_config()", where=path)
    try:
        inspect.signature(get_config).bind(*arguments)
    except TypeError:
        form = "takes no argument: --config=FILE" if arguments else "needs one: --config=FILE:ARG"
        raise RequestError(f"get_config() {form}", where=path) from None
    with _blamed(path):
        return get_config(*arguments)


@contextlib.contextmanager
def _blamed(path: pathlib.Path) -> Iterator[None]:
    """Turns whatever the file raises into one line that names the file's own line."""
    try:
        yield
    except SyntaxError as error:
        raise RequestError(
            f"{type(error).__name__}: {error.msg}", where=f"{path}:{error.lineno}"
        ) from None
    except (Exception, SystemExit) as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [f.lineno for f in frames if pathlib.Path(f.filename) == path]
        where = f"{path}:{lines[-1]}" if lines else str(path)
        if isinstance(error, RequestError):
            raise RequestError(error.message, key=error.key, where=error.where or where) from None
        hint = ""
        if "dots in field names" in str(error):
            hint = "; write optim.groups as a list of {pattern, lr_scale, weight_decay}"
        raise RequestError(f"{type(error).__name__}: {error}{hint}", where=where) from None


def _is_config_key(key: str | None) -> bool:
    """Whether an error's key is one of a config, and not a flag such as --workdir."""
    return key is not None and not key.startswith("-")


def _covers(flag: str, key: str) -> bool:
    """Whether a flag set this key, something in it, or the whole that holds it."""
    return any(a == b or a.startswith((f"{b}.", f"{b}[")) for a, b in ((flag, key), (key, flag)))


def _line_of(path: pathlib.Path, key: str) -> int | None:
    """Returns the line of the file that sets the key, if exactly one does."""
    if path.suffix != ".py":
        return None
    name = key.rpartition(".")[2].partition("[")[0]
    lines = set()
    for node in ast.walk(ast.parse(path.read_bytes())):
        match node:
            case ast.Attribute(attr=found, ctx=ast.Store()) if found == name:
                lines.add(node.lineno)
            case ast.keyword(arg=found) if found == name:
                lines.add(node.value.lineno)
            case ast.Dict():
                keys = [k for k in node.keys if isinstance(k, ast.Constant) and k.value == name]
                lines.update(k.lineno for k in keys)
            case ast.Subscript(slice=ast.Constant(value=found), ctx=ast.Store()) if found == name:
                lines.add(node.lineno)
    return lines.pop() if len(lines) == 1 else None
