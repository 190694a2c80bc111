"""The page of reward models: what is reported was not chosen on, and what its figures are."""

import numpy as np

from benchmarks import results_reward as bench
from benchmarks.reward_pairs import ANSWER, FOLDS, VALIDATED, Pair, comparable, divided

PAIRS = [Pair("Why?", "no " * (i % 3 + 1), "yes " * (i % 2 + 1)) for i in range(40)]


def test_each_reported_pair_is_held_out_once_and_none_chose_the_settings():
    chosen, reported = divided(40)
    assert len(chosen) == VALIDATED and len(reported) == FOLDS
    assert sorted(np.concatenate([*chosen, *reported]).tolist()) == list(range(40))
    assert sum(map(len, chosen)) == 20


def test_the_page_compares_pair_by_pair():
    _, reported = divided(len(PAIRS))
    results = [
        # Right but for the last of each part.
        {
            "margins": [1.0] * (len(part) - 1) + [-1.0],
            "parameters": {"total": 7},
            "steps": 3,
            "seconds": 1.0,
        }
        for part in reported
    ]
    page = bench.page(PAIRS, results, {"rate": "0.1", "epochs": "1"})
    lines = {line.split("|")[1].strip(): line for line in page.splitlines() if "|" in line}
    right = 1 - len(reported) / 20
    assert f"| {100 * right:.1f} % (" in lines["what the reward model prefers"]
    order = np.concatenate(reported)
    shorter = [len(PAIRS[i].rejected) - len(PAIRS[i].chosen) for i in order]
    ahead = 100 * (right - float(np.mean((np.sign(shorter) + 1) / 2)))
    assert f"| {ahead:+.1f} (" in lines["the shorter"]
    assert f"| {100 * right - 50:+.1f} (" in lines["the first, in random order (majority)"]


def test_pairs_of_which_no_difference_is_seen_count_as_half():
    assert bench.right(np.array([2.0, 0.0, -1.0])).tolist() == [1.0, 0.5, 0.0]
    same = "a" * ANSWER
    assert not comparable(Pair("q", same + "b", same + "c"))
    assert not comparable(Pair("q", "", "c"))
