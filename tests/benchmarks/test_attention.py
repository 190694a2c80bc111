"""The attention benchmark runs every back end of this machine and prints its table."""

import pytest

from benchmarks import attention


@pytest.mark.slow
def test_a_tiny_contest_prints_a_row_a_back_end(capsys):
    argv = ["--tokens=32,64", "--rounds=1", "--heads=2", "--size=8", "--devices=2", "--window=9"]
    assert attention.main([*argv, "--dtype=float32"]) == 0
    lines = [line.split("|")[1:3] for line in capsys.readouterr().out.splitlines()[2:]]
    assert [[cell.strip() for cell in line] for line in lines] == [
        ["32", "xla"],
        ["32", "ring"],
        ["64", "xla"],
        ["64", "ring"],
    ]
