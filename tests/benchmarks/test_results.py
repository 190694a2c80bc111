"""The results benchmark runs on real data and writes what it measured."""

import json
from collections import Counter

import numpy as np
import pytest

from benchmarks import results, tasks
from benchmarks.page import OBJECTIVES, objectives_part, task_table


@pytest.fixture(scope="module")
def sms(shared):
    return tasks.sms_spam(shared / "data", tasks.characters(shared / results.MODEL))


def test_tasks_hold_every_record_once_in_characters_that_the_model_knows(shared, sms):
    known = tasks.characters(shared / results.MODEL)
    assert len(known) == 102  # 105 ids less <unk>, BOS and EOS
    rasbt = tasks.rasbt(shared / "data", known)
    for task, dropped in ((sms, 0), (rasbt, rasbt.counts["dropped"])):
        pairs = [*task.train, *task.held]
        assert len(pairs) == task.counts["records"] - dropped
        assert len(task.held) == pytest.approx(0.2 * len(pairs), abs=1)
        assert all(set(prompt + completion) <= known for prompt, completion in pairs)
        assert max(tasks.tokens(*pair) for pair in pairs) <= task.length
    assert sms.counts["records"] == 5574 - sms.counts.get("continuations of the line before", 0)
    assert {answer for _, answer in sms.train} == set(sms.choices)


def test_spell():
    counts = Counter()
    known = set("abcdefghijklmnopqrstuvwxyzNPBG. *")
    assert tasks.spell("caf\u00e9\n\n#b \u00a3c \u4e2d", known, counts) == "cafe No.b GBP c *"
    assert counts["characters spelled otherwise"] == 6


def test_table_has_a_row_for_the_base_and_each_method(sms):
    before = results.Measured(0.5, 0.75, 0.625, 0.608)
    after = results.Measured(0.25, 0.875, 0.8, 0.708)
    run = results.Run("lora", 0.0625, 1234, 0.01, 7, 0.3, 12.0, after)
    lines = task_table(sms, before, [run]).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert len({len(row) for row in cells}) == 1
    assert cells[2] == [
        *["before", "", "", "", ""],
        *["0.5000", "75.0 %", "62.5 %", "0.6080", "", ""],
    ]
    assert cells[3] == [
        *["lora", "1,234", "6.25 %", "0.01", "7"],
        *["0.2500", "87.5 %", "80.0 %", "0.7080", "+0.1000", "12"],
    ]


def test_the_page_holds_the_tables_of_the_other_objectives_as_they_are(tmp_path):
    """`python -m benchmarks.results --objectives` writes them after a page was made anew."""
    docs = results.ROOT / "docs"
    page = (docs / "results.md").read_text()
    assert page.endswith(f"\n\n{objectives_part(docs)}")
    for name, words in (
        ("dpo", "| SFT on chosen |"),
        ("reward", "| the shorter |"),
        ("rl", "| `ppo` |"),
    ):
        command, shown = f"`python -m benchmarks.results_{name}`", f"(results_{name}.md)"
        assert command in page and shown in page
        lines = [x for x in page.splitlines() if x.startswith(words)]
        assert lines and set(lines) <= set((docs / f"results_{name}.md").read_text().splitlines())
    old = tmp_path / "page.md"
    old.write_text(page.replace("| SFT on chosen |", "| other |"))
    assert results.main(["--objectives", f"--out={old}"]) == 0
    assert old.read_text() == page and page.count(OBJECTIVES) == 1


@pytest.mark.slow
def test_a_quick_run_writes_the_page(shared, sms, tmp_path, capsys):
    from jaxtune.recipes.evaluation.evaluate import evaluate

    page = tmp_path / "page.md"
    argv = ["--quick", "--methods=bitfit", "--tasks=sms_spam", f"--out={page}"]
    assert results.main(argv) == 0
    text, others, _ = page.read_text().partition(OBJECTIVES)
    assert others
    rows = {
        line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]]
        for line in text.splitlines()
        if line.startswith(("| before", "| bitfit"))
    }
    assert rows["bitfit"][3] == str(results.QUICK_STEPS)
    # the figures are those that `jaxtune eval` gives
    held = tmp_path / "held.jsonl"
    pairs = sms.held[: results.QUICK_EXAMPLES]
    held.write_text("".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in pairs))
    report = evaluate(
        model=shared / results.MODEL,
        data=f"jsonl:{held}",
        format="completion",
        dtype="float32",
        labels=("auto",),
    )
    assert rows["before"][5] == f"{100 * report['labels']['accuracy']['value']:.1f} %"
    np.testing.assert_allclose(float(rows["before"][4]), report["loss"], atol=1e-4)
    assert float(rows["bitfit"][4]) < float(rows["before"][4])
