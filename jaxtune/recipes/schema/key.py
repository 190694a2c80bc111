"""How a key of a config is declared."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

REQUIRED = "<required>"  # no default: the user must give the key
ABSENT = "<absent>"  # left out of the resolved config unless it is given


@dataclasses.dataclass(frozen=True)
class Key:
    """One key of the config.

    Attributes:
        path: dotted name, such as `peft.rank`.
        kind: `int`, `float`, `bool`, `text`, `path`, `choice`, `source`, `targets` (a regex, or a
            list of names), `patterns` (a list of path regexes), `texts` (a list of strings),
            `table` (a free mapping), `groups`, or `entries` (a list of sections whose keys are
            `entry`).
        default: the value where the key is not given; REQUIRED or ABSENT.
        doc: one line for the reference page.
        choices: valid values of a `choice`.
        refused: values that are known by name but cannot be had, with the reason.
        low, high: closed bounds; `above`, `below`: open bounds.
        optional: None is a valid value.
        used_by: conditions (selector key, values), all of which must hold for the key to apply.
        defaults: default for a value of the first selector, where it differs from `default`.
        entry: keys of one element of `entries`.
        stored: an adapter directory says it: with `peft.init_from` it has no default.
    """

    path: str
    kind: str
    default: Any
    doc: str
    choices: tuple[str, ...] = ()
    refused: Mapping[str, str] = dataclasses.field(default_factory=dict)
    low: float | None = None
    high: float | None = None
    above: float | None = None
    below: float | None = None
    optional: bool = False
    used_by: tuple[tuple[str, tuple[str, ...]], ...] = ()
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    entry: tuple[Key, ...] = ()
    stored: bool = False

    @property
    def name(self) -> str:
        """Last part of the dotted path."""
        return self.path.rpartition(".")[2]
