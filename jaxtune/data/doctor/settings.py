"""What a diagnosis is asked for: plain values, which every worker process gets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

# Words by which groups are told; every word of an axis stands for its place in counterfactuals.
GROUPS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "gender": {
        "female": (
            "she", "her", "hers", "herself", "woman", "women", "girl", "girls", "mother", "mom",
            "daughter", "sister", "wife", "aunt", "lady", "mrs", "ms",
            "emily", "emma", "sarah", "anna", "maria", "lily", "lucy", "jane", "mary", "alice",
        ),
        "male": (
            "he", "him", "his", "himself", "man", "men", "boy", "boys", "father", "dad", "son",
            "brother", "husband", "uncle", "gentleman", "mr",
            "john", "james", "michael", "david", "tom", "tim", "max", "ben", "bob", "peter",
        ),
    },
}  # fmt: skip


@dataclass(frozen=True)
class Input:
    """One source to look at.

    Attributes:
        name: for reports.
        source: `jsonl:…`, `text:…` or `tfds:…`.
        format: a name in `formats.FORMATS`.
        split: rows that are in two splits leak; the first split of a list is what is trained on.
        key: the flag or config key named in errors.
    """

    name: str
    source: str
    format: str
    split: str
    key: str = "--data"


@dataclass(frozen=True)
class Evaluation:
    """An evaluation set that training data must not hold.

    Attributes:
        name: for reports.
        source: as for data.
        field: the field of the question; None takes those that are usual.
    """

    name: str
    source: str
    field: str | None = None


@dataclass(frozen=True)
class Settings:
    """A request to the doctor.

    Attributes:
        inputs: the data, training data first.
        tokenizer: directory with a tokenizer, or None.
        template: chat template in place of the tokenizer's own, or None.
        seq_len: tokens a row, or None.
        evaluations: sets that the data are compared with.
        near: Jaccard similarity of character 5-grams from which rows are near duplicates.
        words: of the user's toxicity list; none by default.
        groups: {axis: {group: words}}, lower case, for answers across groups.
        workers: processes; 1 works in this one; None takes as many as there are cores, but one
            for little data.
        kept_lines: line numbers kept of each kind and input in the report.
        kept_examples: examples kept of each kind.
    """

    inputs: tuple[Input, ...]
    tokenizer: str | None = None
    template: str | None = None
    seq_len: int | None = None
    evaluations: tuple[Evaluation, ...] = ()
    near: float = 0.8
    words: tuple[str, ...] = ()
    groups: Mapping[str, Mapping[str, tuple[str, ...]]] = field(default_factory=lambda: GROUPS)
    workers: int | None = 1
    kept_lines: int = 10_000
    kept_examples: int = 5

    def given(self) -> frozenset[str]:
        """Returns which `Kind.needs` are met."""
        met = {
            "": True,
            "tokenizer": self.tokenizer is not None,
            "seq_len": self.seq_len is not None and self.tokenizer is not None,
            "splits": len({item.split for item in self.inputs}) > 1,
            "against": bool(self.evaluations),
            "words": bool(self.words),
        }
        return frozenset(name for name, is_met in met.items() if is_met)
