"""The benchmark of GRPO runs, samples once an iteration, and writes its page."""

import importlib.util

import pytest

from benchmarks import rl
from benchmarks.rl_entrants import even


def test_the_reward_is_the_share_of_even_words():
    assert even(["w1"] * 3, ["w2 w4", "w1 w2 <unk>", ""]) == [1.0, 0.5, 0.0]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="needs trl")
def test_a_tiny_contest_writes_the_page(tmp_path, capsys):
    # `contest` itself raises if an entrant does not sample, and `generation.check` if models differ
    page = tmp_path / "page.md"
    argv = ["--prompt=6", "--tokens=4", "--prompts=2", "--samples=2", "--rounds=1", "--width=64"]
    assert rl.main([*argv, "--vocab=97", "--layers=1", "--write", f"--out={page}"]) == 0
    out = capsys.readouterr().out
    assert out[out.index("|") : out.rindex("|")].splitlines()[0] in page.read_text()
    names = [line.split("|")[1].strip() for line in out.splitlines() if line.startswith("|")]
    assert names[2] == "jaxtune" and names[3].startswith("TRL ")
    assert names[-2:] == ["equal lengths, jaxtune, 4 slots", "equal lengths, transformers"]
