"""Parts of a source: the examples whose records have the same value in a field."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxtune.core.errors import RequestError, nearest
from jaxtune.data.sources import Source

MOST = 200  # parts of a source


@dataclass(frozen=True, eq=False)
class Part:
    """Some examples of a store, at random access, as a store has them.

    Attributes:
        store: a TokenStore or SharedStore.
        chosen: int64 [examples], which of its examples.
    """

    store: Any
    chosen: np.ndarray

    def __len__(self) -> int:
        return len(self.chosen)

    @property
    def format(self) -> str:
        """That of the examples; see `TokenStore`."""
        return self.store.format

    @property
    def shared(self) -> bool:
        """Whether the completions of a prompt share it in a row."""
        return self.store.shared

    @property
    def keys(self) -> tuple[str, ...]:
        """Names of the batch keys that its examples have beside those of every batch."""
        return self.store.keys

    @property
    def targets(self) -> np.ndarray:
        """How many targets each example has, int64 [examples]."""
        return self.store.targets[self.chosen]

    @property
    def completions(self) -> np.ndarray:
        """How many completions each example has, int64 [examples]."""
        return self.store.completions[self.chosen]

    def room(self, num_virtual: int) -> np.ndarray:
        """Returns how many tokens of a row each example takes, int64 [examples]."""
        return self.store.room(num_virtual)[self.chosen]

    def example(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns ids int32 [T] and mask float32 [T] of an example."""
        return self.store.example(int(self.chosen[index]))

    def example_columns(self, index: int) -> dict[str, np.ndarray]:
        """Returns the columns of an example, {name: array [T]}; see `columns.example_columns`."""
        return self.store.example_columns(int(self.chosen[index]))


def by_key(key: str | None) -> str:
    """Returns what names the field in errors: a flag, or the entry's own key.

    >>> by_key("--data"), by_key("data.eval[0]")
    ('--by', 'data.eval[0].by')
    """
    return "--by" if key is None or key.startswith("--") else f"{key}.by"


def values_of(source: Source, records: Sequence[int], field: str, key: str) -> list[str]:
    """Returns a field of records as text.

    Args:
        source: the records.
        records: their numbers.
        field: a text, number or truth value.
        key: named in errors.

    Raises:
        RequestError: a record without the field, or with a list or object there, with its line.
    """
    found = []
    for record in records:
        value = source[int(record)].get(field)
        if not isinstance(value, str | int | float):
            names = [str(name) for name in source[int(record)]]
            what = "no field" if value is None else "no text or number in"
            raise RequestError(
                f"the record has {what} {field!r}{nearest(field, names)}",
                key=key,
                where=source.where(int(record)),
            )
        found.append(str(value))
    return found


def parts_of(store: Any, field: str, key: str) -> dict[str, Part]:
    """Returns {value: the examples whose records have it in a field}, in order of appearance.

    Args:
        store: a TokenStore or SharedStore.
        field: of the records.
        key: named in errors.

    Raises:
        RequestError: a record without the field, or more than MOST values.
    """
    values = values_of(store.source, store.records, field, key)
    names = dict.fromkeys(values)
    if len(names) > MOST:
        raise RequestError(f"{field!r} has {len(names)} values, more than {MOST} parts", key=key)
    array = np.array(values, object)
    return {name: Part(store, np.flatnonzero(array == name)) for name in names}
