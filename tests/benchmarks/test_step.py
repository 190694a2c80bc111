"""The step benchmark runs, agrees with its hand-written reference, and writes its table."""

import pytest

from benchmarks import step


@pytest.mark.slow
def test_a_tiny_contest_writes_the_page(tmp_path, capsys):
    # `contest` itself raises if the two programs' losses differ
    page = tmp_path / "page.md"
    argv = ["--preset=tiny-1m", "--batch_size=2", "--seq_len=16", "--rounds=2", "--methods=lora"]
    assert step.main([*argv, "--no-torch", "--write", f"--out={page}"]) == 0
    table = capsys.readouterr().out
    assert table.strip() in page.read_text()
    rows = [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("| lora")]
    assert rows == ["lora, jaxtune", "lora, plain JAX"]
