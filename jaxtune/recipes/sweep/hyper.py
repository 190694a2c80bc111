"""Trials of a sweep: lists of overrides, made by `get_hyper(h)` or by `--sweep` flags."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Sequence
from typing import Any

from jaxtune.core.errors import RequestError
from jaxtune.recipes.schema.overrides import parse

Trial = dict[str, Any]  # {dotted key: value}


class Hyper:
    """What `get_hyper(h)` builds trials from; a trial is a dict of overrides.

    >>> h = Hyper()
    >>> h.product(h.sweep("optim.lr", [1e-3, 1e-4]), h.fixed("peft.rank", 4))
    [{'optim.lr': 0.001, 'peft.rank': 4}, {'optim.lr': 0.0001, 'peft.rank': 4}]
    """

    @staticmethod
    def sweep(key: str, values: Sequence[Any]) -> list[Trial]:
        """Returns a trial for each value of a key."""
        return [{key: value} for value in values]

    @staticmethod
    def fixed(key: str, value: Any) -> list[Trial]:
        """Returns the one trial that sets a key."""
        return [{key: value}]

    @staticmethod
    def product(*parts: Any) -> list[Trial]:
        """Returns every combination of one trial from each part; parts, or one list of them."""
        return [_merge(combination) for combination in itertools.product(*_parts(parts))]

    @staticmethod
    def zip(*parts: Any) -> list[Trial]:
        """Returns first with first, second with second, …; the parts have one length."""
        lists = _parts(parts)
        if len({len(part) for part in lists}) > 1:
            raise RequestError(f"zip of parts of different lengths: {[len(p) for p in lists]}")
        return [_merge(row) for row in zip(*lists, strict=True)]

    @staticmethod
    def chain(*parts: Any) -> list[Trial]:
        """Returns the trials of each part one after the other."""
        return [trial for part in _parts(parts) for trial in part]


def _parts(parts: tuple[Any, ...]) -> list[list[Trial]]:
    if len(parts) == 1 and all(isinstance(part, list | tuple) for part in parts[0]):
        return list(parts[0])
    return list(parts)


def _merge(trials: Sequence[Trial]) -> Trial:
    merged: Trial = {}
    for trial in trials:
        for key in trial:
            if key in merged:
                raise RequestError("two parts of a product or zip set it", key=key)
        merged |= trial
    return merged


def from_flags(flags: Sequence[tuple[str, str]]) -> list[Trial]:
    """Returns the product of `--sweep.KEY=v1,v2` flags.

    >>> from_flags([("optim.lr", "1e-3,1e-4"), ("peft.method", "lora")])
    [{'optim.lr': 0.001, 'peft.method': 'lora'}, {'optim.lr': 0.0001, 'peft.method': 'lora'}]
    """
    return Hyper.product([Hyper.sweep(key, _values(key, text)) for key, text in flags])


def _values(key: str, text: str) -> list[Any]:
    # commas inside brackets or quotes belong to a value
    pieces = re.findall(r"(?:\[[^\]]*\]|\([^)]*\)|\{[^}]*\}|'[^']*'|\"[^\"]*\"|[^,])+", text)
    if not pieces:
        raise RequestError("expected --sweep.KEY=VALUE,VALUE", where=f"--sweep.{key}")
    return [parse(key, piece.strip()) for piece in pieces]


def short_name(overrides: Trial) -> str:
    """Returns `lr=0.001,rank=8`: safe as a directory name, at most 80 characters."""
    names = [key.rpartition(".")[2] for key in overrides]
    parts = [
        f"{key if names.count(name) > 1 else name}={_short(value)}"
        for (key, value), name in zip(overrides.items(), names, strict=True)
    ]
    text = re.sub(r"[^\w.,=+-]+", "_", ",".join(parts)) or "base"
    if len(text) > 80:
        text = f"{text[:71]}-{hashlib.blake2b(text.encode(), digest_size=4).hexdigest()}"
    return text


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list | tuple):
        return "+".join(map(_short, value))
    if isinstance(value, str):
        return value.rstrip("/").rpartition("/")[2]
    return str(value)
