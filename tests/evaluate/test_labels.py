"""Classification by likelihood, example by example."""

from __future__ import annotations

import math

import numpy as np
import pytest

from jaxtune.evaluate.bootstrap import interval
from jaxtune.evaluate.labels import FIGURES, by_label, confusion, figures

NUMBER = 3


@pytest.fixture(scope="module")
def case():
    """(log-likelihoods [60, 3], truth [60]): the last label is never right, and seldom chosen."""
    rng = np.random.default_rng(0)
    truth = rng.integers(0, NUMBER - 1, 60)
    logprobs = rng.normal(-30, 2, (60, NUMBER))
    logprobs[np.arange(60), truth] += 2
    return logprobs, truth


def slowly(logprobs, truth) -> dict[str, float]:
    rows = [[math.exp(x) for x in row] for row in logprobs]
    rows = [[x / sum(row) for x in row] for row in rows]
    chosen = [row.index(max(row)) for row in rows]
    f1, recalls = [], []
    for label in range(NUMBER):
        hits = sum(c == t == label for c, t in zip(chosen, truth, strict=True))
        either = sum(c == label for c in chosen) + sum(t == label for t in truth)
        f1 += [2 * hits / either] if either else []
        wanted = sum(t == label for t in truth)
        recalls += [hits / wanted] if wanted else []
    found = {
        "accuracy": np.mean([c == t for c, t in zip(chosen, truth, strict=True)]),
        "macro_f1": np.mean(f1),
        "balanced_accuracy": np.mean(recalls),
        "nll": np.mean([-math.log(row[t]) for row, t in zip(rows, truth, strict=True)]),
        "brier": np.mean(
            [
                sum((x - (k == t)) ** 2 for k, x in enumerate(r))
                for r, t in zip(rows, truth, strict=True)
            ]
        ),
    }
    for bins in (10, 15):
        error = 0.0
        for b in range(bins):
            inside = [
                (c == t, max(row))
                for c, t, row in zip(chosen, truth, rows, strict=True)
                if b / bins <= max(row) < (b + 1) / bins or (max(row) == 1 and b == bins - 1)
            ]
            if inside:
                right, claimed = (np.mean(side) for side in zip(*inside, strict=True))
                error += len(inside) / len(rows) * abs(right - claimed)
        found[f"ece_{bins}"] = error
    return found


def test_the_figures_are_those_of_each_example(case):
    found = figures(*case)
    assert tuple(found) == FIGURES
    assert {name: figure.whole for name, figure in found.items()} == pytest.approx(slowly(*case))


@pytest.mark.parametrize("name", ["macro_f1", "balanced_accuracy", "ece_10", "brier"])
def test_the_interval_is_that_of_examples_drawn_anew(case, name):
    logprobs, truth = case
    chosen = np.random.default_rng(3).integers(0, 60, (50, 60))
    drawn = [slowly(logprobs[row], truth[row])[name] for row in chosen]
    low, high = interval(figures(*case)[name], 3, 50)[1:]
    assert (low, high) == pytest.approx(tuple(np.quantile(drawn, [0.025, 0.975])))


def test_the_confusion_counts_every_example(case):
    logprobs, truth = case
    counts = confusion(logprobs, truth)
    for right in range(NUMBER):
        for chosen in range(NUMBER):
            hits = (truth == right) & (logprobs.argmax(axis=1) == chosen)
            assert counts[right, chosen] == hits.sum()
    told = by_label(counts, ("a", "b", "c"))
    assert told["c"] == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "examples": 0}
    assert told["a"]["recall"] == pytest.approx(counts[0, 0] / (truth == 0).sum())


def test_likelihoods_that_underflow_have_figures():
    found = figures(np.array([[-5000.0, -5100.0], [-9000.0, -8000.0]]), np.array([0, 0]))
    assert found["accuracy"].whole == 0.5 and found["nll"].whole == pytest.approx(500)
