"""Which objective reads which format."""

from __future__ import annotations

import pytest

from jaxtune.core.errors import RequestError
from jaxtune.data import formats
from jaxtune.data.columns import KEYS
from jaxtune.recipes.schema.formats import (
    FORMATS_OF,
    check_formats,
    check_overlong,
    splits_pairs,
)
from jaxtune.recipes.schema.keys import FORMATS


def entries(*names: str) -> tuple[dict[str, str], ...]:
    return tuple({"source": "jsonl:a", "format": name} for name in names)


def test_the_tables_know_the_same_formats():
    assert set(FORMATS) == set(formats.FORMATS)
    assert {name for names in FORMATS_OF.values() for name in names} == set(FORMATS)
    assert set(KEYS) < set(FORMATS)


@pytest.mark.parametrize(
    ("objective", "names"),
    [
        ("sft", ("chat", "text")),
        ("dpo", ("preference",)),
        ("kto", ("preference", "unpaired")),
        ("reward", ("ranked", "preference")),
        ("reward", ("stepwise", "stepwise")),
        ("grpo", ("prompt",)),
    ],
)
def test_what_an_objective_reads(objective, names):
    check_formats(objective, "train", entries(*names))


@pytest.mark.parametrize(
    ("objective", "names", "index", "words"),
    [
        ("sft", ("chat", "preference"), 1, "reads 'chat' or .*'preference' is read by dpo, simpo"),
        ("sft", ("prompt",), 0, "read by grpo, ppo"),
        ("dpo", ("ranked",), 0, "reads 'preference'; 'ranked' is read by reward"),
        ("orpo", ("unpaired",), 0, "is read by kto"),
        ("grpo", ("preference",), 0, "reads 'prompt'"),
        ("reward", ("preference", "stepwise"), 1, "does not mix with 'preference'"),
        ("reward", ("stepwise", "ranked"), 1, "does not mix with 'stepwise'"),
    ],
)
def test_what_it_does_not_read(objective, names, index, words):
    with pytest.raises(RequestError, match=words) as error:
        check_formats(objective, "eval", entries(*names))
    assert error.value.key == f"data.eval[{index}].format"


def test_pairs_are_split_for_what_learns_from_single_answers():
    assert [name for name in FORMATS_OF if splits_pairs(name, "preference")] == ["kto"]
    assert not splits_pairs("kto", "unpaired")


def test_prompts_are_not_cut():
    check_overlong("ppo", "drop")
    check_overlong("sft", "truncate")
    with pytest.raises(RequestError, match="a prompt is not cut") as error:
        check_overlong("ppo", "truncate")
    assert error.value.key == "data.overlong"
