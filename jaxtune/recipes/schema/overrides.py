"""Setting one key of a raw config by its dotted name: for flags and sweeps."""

from __future__ import annotations

import ast
import itertools
import re
from typing import Any

from jaxtune.core.errors import RequestError
from jaxtune.recipes.schema.keys import BY_PATH, Key

_PART = re.compile(r"\.?(?:(?P<name>[^.\[\]]+)|\[(?P<item>\d+|'[^']*'|\"[^\"]*\")\])")
_AS_WRITTEN = ("text", "path", "choice", "source", "regex")


def split(path: str) -> tuple[str | int, ...]:
    """Returns the parts of a dotted path; `a.0` is `a[0]`, which shells take without quotes.

    >>> split("data.train[0].source"), split("optim.groups['a.*'].lr_scale")
    (('data', 'train', 0, 'source'), ('optim', 'groups', 'a.*', 'lr_scale'))

    Raises:
        RequestError: for a path that cannot be read.
    """
    parts: list[str | int] = []
    at = 0
    while at < len(path):
        match = _PART.match(path, at)
        if not match or (at == 0) == path[match.start() :].startswith((".", "[")):
            raise RequestError("expected a.b, a.b[0].c or a.b['x'].c", key=path)
        name, item = match["name"], match["item"]
        if item is not None:
            parts.append(ast.literal_eval(item))
        else:
            parts.append(int(name) if name.isdecimal() else name)
        at = match.end()
    if not parts:
        raise RequestError("expected a key", key=path)
    return tuple(parts)


def declared(path: str) -> Key | None:
    """Returns the declaration of a key, of an element's key included, or None."""
    parts = split(path)
    for length in (1, 2):
        key = BY_PATH.get(".".join(map(str, parts[:length])))
        if key is None:
            continue
        rest = parts[length:]
        if not rest:
            return key
        if key.entry and len(rest) == 2:
            return next((inner for inner in key.entry if inner.name == rest[1]), None)
    return None


def parse(path: str, text: str) -> Any:
    """Returns the value that a flag's text means for this key.

    Text, paths and choices are taken as written, `None` means None, and everything else is a Python
    literal (`true` and `false` too); what is no literal stays text, which the schema refuses.
    """
    key = declared(path)
    if text in ("None", "none", "null") and not (key and text in key.choices):
        return None
    if key is not None and key.kind in _AS_WRITTEN:
        return text
    if key is not None and key.kind == "bool" and text in ("0", "1"):
        return text == "1"
    if text in ("true", "false"):
        return text == "true"
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return text


def assign(tree: dict[str, Any], path: str, value: Any) -> None:
    """Sets a key in nested dicts and lists, making the sections on the way.

    An index one past a list's end appends a section to it.

    Raises:
        RequestError: where the path goes through something that holds no keys.
    """
    parts = split(path)
    last = parts[-1]
    node: Any = tree
    for head, following in itertools.pairwise(parts):
        node = _step(node, head, path, list if isinstance(following, int) else dict)
    if isinstance(node, list) and isinstance(last, int) and last <= len(node):
        node[last : last + 1] = [value]
    elif isinstance(node, dict) and isinstance(last, str):
        node[last] = value
    else:
        raise _no_way(node, last, path)


def _step(node: Any, part: str | int, path: str, fresh: type) -> Any:
    if isinstance(node, dict) and isinstance(part, str):
        if node.get(part) is None:
            node[part] = fresh()
        return node[part]
    if isinstance(node, list) and isinstance(part, int) and part <= len(node):
        if part == len(node):
            node.append(fresh())
        return node[part]
    raise _no_way(node, part, path)


def _no_way(node: Any, part: str | int, path: str) -> RequestError:
    if isinstance(node, list) and isinstance(part, str):
        whole, _, rest = path.partition(f".{part}")
        return RequestError(f"{whole} is a list; name an entry: {whole}[0].{part}{rest}", key=path)
    if isinstance(node, list):
        return RequestError(f"{part!r} is no index of a list of {len(node)}", key=path)
    return RequestError(f"there is no {part!r} in {node!r}", key=path)
