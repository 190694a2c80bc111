"""Counts that several processes make and one adds up, bounded in memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

_MOST = 50_000
_KEPT = 20_000


@dataclass
class Tally:
    """Counts over rows.

    Attributes:
        languages: rows by language.
        openings: rows by the first words of the answer.
        labels: rows by answer, short ones only.
        long_answers: rows whose answer is no label.
        fields: {field: rows by value} of short text fields that the format does not read.
        terms: rows by word that they hold.
        pruned: names of counters that dropped rare entries to stay small.
    """

    languages: Counter[str] = field(default_factory=Counter)
    openings: Counter[str] = field(default_factory=Counter)
    labels: Counter[str] = field(default_factory=Counter)
    long_answers: int = 0
    fields: dict[str, Counter[str]] = field(default_factory=dict)
    terms: Counter[str] = field(default_factory=Counter)
    pruned: set[str] = field(default_factory=set)

    def add(self, other: Tally) -> None:
        """Adds the counts of another; a counter that grows too large keeps what is frequent."""
        for name in ("languages", "openings", "labels", "terms"):
            getattr(self, name).update(getattr(other, name))
            setattr(self, name, self._bounded(name, getattr(self, name)))
        for name, counts in other.fields.items():
            mine = self.fields.setdefault(name, Counter())
            mine.update(counts)
            self.fields[name] = self._bounded(f"fields.{name}", mine)
        self.long_answers += other.long_answers

    def _bounded(self, name: str, counts: Counter[str]) -> Counter[str]:
        if len(counts) <= _MOST:
            return counts
        self.pruned.add(name)
        return Counter(dict(ranked(counts)[:_KEPT]))


def ranked(counts: Mapping[str, int]) -> list[tuple[str, int]]:
    """Returns (value, count), frequent ones first; equals in the order of their names.

    >>> ranked({"b": 1, "a": 1, "c": 2})
    [('c', 2), ('a', 1), ('b', 1)]
    """
    return sorted(counts.items(), key=lambda entry: (-entry[1], entry[0]))
