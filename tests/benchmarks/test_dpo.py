"""The DPO benchmark runs, its entrants agree on the first step, and it writes its page."""

import importlib.util

import pytest

from benchmarks import dpo


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="needs trl")
def test_a_tiny_contest_writes_the_page(tmp_path, capsys):
    # `contest` itself raises if losses or log-probabilities differ
    page = tmp_path / "page.md"
    argv = ["--pairs=2", "--prompt=5", "--completion=4", "--rounds=1", "--width=64", "--vocab=97"]
    assert dpo.main([*argv, "--layers=2", "--write", f"--out={page}"]) == 0
    table = capsys.readouterr().out
    table = table[table.index("|") : table.rindex("|") + 1]
    assert table in page.read_text()
    rows = [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("|")][2:]
    assert rows[:2] == ["jaxtune", "jaxtune, prompts shared"] and rows[2].startswith("TRL ")
