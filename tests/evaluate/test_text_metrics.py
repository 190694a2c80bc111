"""Metrics of texts: the figures of the libraries, and intervals that cover what they should."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from jaxtune.core.errors import RequestError
from jaxtune.evaluate.bootstrap import interval, mean_of, paired
from jaxtune.evaluate.text_metrics import METRICS, check_names, measure, words_f1

sacrebleu = pytest.importorskip("sacrebleu")
WORDS = ["the", "cat", "sat", "on", "a", "mat,", "red", "hats.", "And", "dogs", "don't"]


def texts(count: int, wrong: float, seed: int) -> tuple[list[str], list[str]]:
    """Returns (written, wanted): sentences of which some words are others."""
    rng = np.random.default_rng(seed)
    wanted = [list(rng.choice(WORDS, rng.integers(3, 12))) for _ in range(count)]
    written = [[w if rng.random() > wrong else rng.choice(WORDS) for w in row] for row in wanted]
    return [" ".join(row) for row in written], [" ".join(row) for row in wanted]


def test_the_figures_are_those_of_the_libraries():
    from rouge_score import rouge_scorer

    written, wanted = texts(40, 0.3, 0)
    found = {name: figure.whole for name, figure in measure([*METRICS], written, wanted).items()}
    assert found["bleu"] == pytest.approx(sacrebleu.corpus_bleu(written, [wanted]).score)
    assert found["chrf"] == pytest.approx(sacrebleu.corpus_chrf(written, [wanted]).score)
    scorer = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    for name in ("rouge1", "rouge2", "rougeL"):
        each = [scorer.score(b, a)[name].fmeasure for a, b in zip(written, wanted, strict=True)]
        assert found[name] == pytest.approx(np.mean(each))
    assert found["exact_match"] == np.mean([a == b for a, b in zip(written, wanted, strict=True)])
    assert found["f1"] == pytest.approx(np.mean([*map(words_f1, written, wanted)]))


def test_exact_match_forgives_white_space_and_f1_what_squad_forgives():
    pairs = [(" a  b\n", "a b"), ("-5", "5"), ("A cat.", "the cat"), ("", "x"), ("the", "a")]
    found = measure(["exact_match", "f1"], *(list(side) for side in zip(*pairs, strict=True)))
    assert found["exact_match"].sums[:, 0].tolist() == [1, 0, 0, 0, 0]
    assert found["f1"].sums[:, 0].tolist() == [1, 1, 1, 0, 1]


@pytest.mark.parametrize("name", ["bleu", "chrf", "f1"])
def test_an_interval_is_that_of_texts_drawn_anew(name):
    """By drawing the texts themselves, and scoring each draw as a corpus of its own."""
    written, wanted = texts(12, 0.4, 1)
    other, _ = texts(12, 0.4, 1)
    other[3] = other[7] = "nothing of it"
    rng = np.random.default_rng(5)
    chosen = rng.integers(0, 12, (60, 12))

    def drawn(side):
        rows = [([side[i] for i in row], [wanted[i] for i in row]) for row in chosen]
        return np.array([measure([name], *row)[name].whole for row in rows])

    ours, theirs = measure([name], written, wanted)[name], measure([name], other, wanted)[name]
    ends = np.quantile(drawn(written), [0.025, 0.975])
    assert interval(ours, 5, 60)[1:] == pytest.approx(tuple(ends))
    ends = np.quantile(drawn(written) - drawn(other), [0.025, 0.975])
    assert paired(ours, theirs, 5, 60)[1:] == pytest.approx(tuple(ends))


def test_the_interval_covers_the_truth_as_often_as_it_says():
    """Of 300 samples of 80 answers, about 95 % hold the true share, 0.3."""
    rng = np.random.default_rng(0)
    found = [interval(mean_of(rng.random(80) < 0.3), seed, 400) for seed in range(300)]
    assert 0.9 <= np.mean([low <= 0.3 <= high for _, low, high in found]) <= 0.98


def test_names_are_checked(monkeypatch):
    assert check_names(["f1", "f1", "rouge"], "--metrics") == ("f1", "rouge")
    with pytest.raises(RequestError, match=r"--metrics: unknown metric 'blue' \(did you mean"):
        check_names(["blue"], "--metrics")
    with pytest.raises(RequestError, match="--metrics: names no metric"):
        check_names([], "--metrics")
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    with pytest.raises(RequestError, match=r"'chrf' needs sacrebleu: pip install 'jaxtune\[eval"):
        measure(["chrf"], ["a"], ["a"])
