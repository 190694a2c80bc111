"""How answers differ across groups that prompts name.

Two looks: all prompts that name words of one group alone; and counterfactual pairs, prompts that
are equal but for the words of the group (Lu et al. 2018, arXiv:1807.11714, swap such words to
find bias; here both sides are looked up in the data).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple


class Named(NamedTuple):
    """The answer to a prompt that names one group of an axis.

    Attributes:
        axis, group: which.
        key: hash of the prompt with the words of the axis left open.
        answer: hash of the answer.
        words: of the answer.
        refuses: whether it does.
    """

    axis: str
    group: str
    key: int
    answer: int
    words: int
    refuses: bool


@dataclass
class Answers:
    """Answers by axis and group, and those that have a counterpart, as far as memory is bounded.

    Attributes:
        sums: {(axis, group): [rows, words, refusals]}.
        first: {(axis, key): {group: first answer}}, at most `most` keys.
        most: keys kept.
    """

    sums: dict[tuple[str, str], list[int]] = field(default_factory=dict)
    first: dict[tuple[str, int], dict[str, Named]] = field(default_factory=dict)
    most: int = 500_000

    def add(self, answers: Iterable[Named]) -> None:
        """Counts answers."""
        for one in answers:
            sums = self.sums.setdefault((one.axis, one.group), [0, 0, 0])
            sums[0] += 1
            sums[1] += one.words
            sums[2] += one.refuses
            key = (one.axis, one.key)
            if key in self.first or len(self.first) < self.most:
                self.first.setdefault(key, {}).setdefault(one.group, one)

    def report(self) -> dict[str, Any]:
        """Returns {axis: {"groups": {group: figures}, "pairs": [...]}}."""
        axes: dict[str, Any] = {}
        for (axis, group), (rows, words, refusals) in sorted(self.sums.items()):
            entry = axes.setdefault(axis, {"groups": {}, "pairs": []})
            entry["groups"][group] = {
                "rows": rows,
                "answer_words": round(words / rows, 2),
                "refusal_share": round(refusals / rows, 4),
            }
        for axis, entry in axes.items():
            names = list(entry["groups"])
            for at, one in enumerate(names):
                for two in names[at + 1 :]:
                    entry["pairs"].append(self._compare(axis, one, two))
        return axes

    def _compare(self, axis: str, one: str, two: str) -> dict[str, Any]:
        both = [
            (by_group[one], by_group[two])
            for (other, _), by_group in self.first.items()
            if other == axis and one in by_group and two in by_group
        ]
        count = len(both)
        found: dict[str, Any] = {"groups": [one, two], "prompts": count}
        if count:
            gap = sum(a.words - b.words for a, b in both) / count
            found["word_difference"] = round(gap, 2)
            found["refuses_only_first"] = sum(a.refuses and not b.refuses for a, b in both)
            found["refuses_only_second"] = sum(b.refuses and not a.refuses for a, b in both)
            found["same_answer_share"] = round(
                sum(a.answer == b.answer for a, b in both) / count, 4
            )
        return found
