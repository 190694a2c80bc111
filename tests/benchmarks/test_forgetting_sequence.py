"""What O-LoRA keeps of an earlier task is measured against the plain run that follows it."""

import dataclasses
import json

import pytest

from benchmarks import forgetting_sequence as sequence
from benchmarks.forgetting_page import Found
from benchmarks.results import MODEL

SIZES = dataclasses.replace(sequence.QUICK, rows=4, train=16, held=4)
NAMES = ("first_", "plain_", *(f"O-LoRA_{x:g}" for x in sequence.STRENGTHS))


@pytest.fixture
def kept(shared, tmp_path):
    """A directory in which every run of both orders has been measured."""
    assert (shared / MODEL).is_dir()
    for order in ("sms_spam_then_rasbt", "rasbt_then_sms_spam"):
        (tmp_path / order).mkdir()
        for number, name in enumerate(NAMES):
            # After the first task its loss is 1; the plain run takes it to 3, the others less far.
            first = 1.0 if number == 0 else 3.0 - 0.25 * (number - 1)
            second = 5.0 if number == 0 else 2.0 + 0.3 * (number - 1)
            found = sequence.Kept(Found(second, 0.9, 4.0), Found(first, 0.8, 4.0))
            path = tmp_path / order / f"{name}.json"
            path.write_text(json.dumps(dataclasses.asdict(found)))
    return tmp_path


def test_the_first_task_s_loss_is_what_is_forgotten(kept, capsys):
    page = kept / "page.md"
    assert sequence.main([f"--keep={kept}", f"--out={page}", "--quick"]) == 0
    assert not [path for path in kept.rglob("config.json")]  # no run was begun
    text = page.read_text()
    assert text.count("## ") == 2 and "`python -m benchmarks.forgetting_sequence --quick`" in text
    rows = [line.strip("|").split("|") for line in text.splitlines() if "O-LoRA |" in line]
    cells = [[cell.strip() for cell in row] for row in rows]
    assert cells[0] == ["O-LoRA", "0.1", "2.3000", "2.7500", "80.0 %", "4.0000", "90 %", "88 %"]
    assert cells[3] == ["O-LoRA", "100", "3.2000", "2.0000", "80.0 %", "4.0000", "60 %", "50 %"]
    assert cells[4:] == cells[:4]


@pytest.mark.slow
def test_a_run_is_pushed_away_from_the_one_before_it(shared, tmp_path, monkeypatch):
    monkeypatch.setattr(sequence, "STRENGTHS", (1.0,))
    sms, rasbt = (
        sequence.small(maker(shared / "data", sequence.tasks.characters(shared / MODEL)), SIZES)
        for maker in (sequence.tasks.sms_spam, sequence.tasks.rasbt)
    )
    steps = {"sms_spam": 2, "rasbt": 2}
    found = sequence.sequence((sms, rasbt), steps, SIZES, ["a b"], tmp_path)
    assert [names for *names, _ in found] == [["first", ""], ["plain", ""], ["O-LoRA", "1"]]
    first, plain, pushed = (kept for *_, kept in found)
    assert first.first.loss < plain.first.loss  # it learned the first task, the others the second
    assert plain.second.loss < first.second.loss
    assert pushed.first != plain.first
