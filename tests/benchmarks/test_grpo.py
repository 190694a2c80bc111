"""The GRPO benchmark runs, its entrants begin at their reference, and it writes its page."""

import importlib.util

import pytest

from benchmarks import grpo


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="needs trl")
def test_a_tiny_contest_writes_the_page(tmp_path, capsys):
    # `contest` itself raises if a KL is not 0 or completions are short
    page = tmp_path / "page.md"
    argv = ["--prompts=2", "--samples=2", "--prompt=5", "--tokens=4", "--rounds=1", "--width=64"]
    argv += ["--vocab=997", "--layers=2", "--write", f"--out={page}"]
    assert grpo.main(argv) == 0
    table = capsys.readouterr().out
    table = table[table.index("|") : table.rindex("|") + 1]
    assert table in page.read_text()
    rows = [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("|")][2:]
    assert rows[0] == "jaxtune" and rows[1].startswith("TRL ")
