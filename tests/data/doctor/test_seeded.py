"""Planted faults are found: recall and precision of each kind, measured."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest

from jaxtune.data.doctor import ngrams
from jaxtune.data.doctor.settings import Evaluation
from tests.data.doctor import world
from tests.data.doctor.conftest import lines_of

EACH = 20


def scores(found: set[int], planted: set[int], before: set[int]) -> tuple[float, float]:
    """Recall and precision; what the rows had before planting is no mistake."""
    right = len(found & planted)
    wrong = len(found - planted - before)
    return right / len(planted), right / max(right + wrong, 1)


@pytest.mark.slow
def test_faults_of_single_rows_are_found(clean_rows, doctor, tmp_path):
    before_path = tmp_path / "before.jsonl"
    before_path.write_text("".join(json.dumps(row) + "\n" for row in clean_rows))
    before = doctor(before_path, words=("blasted",))
    seeded = world.plant(clean_rows, EACH, seed=2)
    report = doctor(seeded.write(tmp_path / "seeded.jsonl"), words=("blasted",))
    measured = {
        kind: scores(lines_of(report, kind), planted, lines_of(before, kind))
        for kind, planted in seeded.planted.items()
    }
    assert {kind: s for kind, s in measured.items() if s[0] < 0.98 or s[1] < 0.95} == {}
    # The rows had next to nothing of these before, so that precision above says something.
    had = {kind: len(lines_of(before, kind)) for kind in seeded.planted}
    assert sum(had.values()) <= 0.005 * len(clean_rows), had


def shingles(row: dict[str, str]) -> set[str]:
    """The slow and obvious way to the sets whose similarity counts."""
    text = " ".join(f"{row['prompt']}\n{row['completion']}".lower().split())
    return {text[i : i + 5] for i in range(len(text) - 4)}


def similarity(one: dict[str, str], two: dict[str, str]) -> float:
    left, right = shingles(one), shingles(two)
    return len(left & right) / len(left | right)


@pytest.mark.slow
def test_repeats_are_found(clean_rows, doctor, tmp_path):
    r = random.Random(3)
    rows = list(clean_rows)
    planted: dict[str, set[int]] = {"duplicate": set(), "near_duplicate": set()}
    far = set()
    for at in r.sample(range(len(clean_rows)), 400):
        row = clean_rows[at]
        if r.random() < 0.25:
            rows.append(row)
            planted["duplicate"].add(len(rows))
            continue
        changed = {name: world.edited(text, r, r.uniform(0.01, 0.12)) for name, text in row.items()}
        rows.append(changed)
        value = similarity(row, changed)
        if value >= 0.8:
            planted["near_duplicate"].add(len(rows))
        elif value < 0.75:
            far.add(len(rows))
    path = tmp_path / "repeats.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = doctor(path)
    assert len(planted["near_duplicate"]) > 100 and len(far) > 20
    recall, precision = scores(lines_of(report, "duplicate"), planted["duplicate"], set())
    assert recall >= 0.98 and precision >= 0.95
    recall, precision = scores(lines_of(report, "near_duplicate"), planted["near_duplicate"], set())
    assert recall >= 0.95 and precision >= 0.95
    assert not far & lines_of(report, "near_duplicate")


@pytest.mark.parametrize(("near", "share"), [(0.6, 0.3), (0.9, 0.08)])
def test_other_similarities_may_be_asked_for(near, share, doctor, tmp_path):
    r = random.Random(31)
    rows = world.made_rows(300, seed=30)
    close = set()
    for at in range(150):
        text = {name: world.edited(text, r, r.uniform(0, share)) for name, text in rows[at].items()}
        rows.append(text)
        if similarity(rows[at], text) >= near:
            close.add(len(rows))
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = lines_of(doctor(path, near=near), "near_duplicate")
    recall, precision = scores(found, close, set())
    assert len(close) > 20 and recall >= 0.95 and precision == 1.0


def test_rows_of_another_split_are_found(clean_rows, doctor, tmp_path):
    r = random.Random(4)
    train, held = clean_rows[:1000], list(clean_rows[1000:1300])
    leaks, near = r.sample(range(1000), 40), r.sample(range(1000), 40)
    held += [train[at] for at in leaks]
    held += [{**train[at], "completion": train[at]["completion"] + " Fine."} for at in near]
    files = {"train": train, "test": held}
    for name, rows in files.items():
        files[name] = tmp_path / f"{name}.jsonl"
        files[name].write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = doctor(files)
    assert lines_of(report, "split_leak") == {at + 1 for at in leaks}
    assert lines_of(report, "split_leak", "test") == set()
    recall, precision = scores(
        lines_of(report, "near_split_leak"), {at + 1 for at in near if at not in leaks}, set()
    )
    assert recall >= 0.95 and precision >= 0.95


@pytest.fixture(scope="session")
def questions() -> list[str]:
    """Evaluation items of 6 to 40 words."""
    r = random.Random(5)
    out = []
    for i in range(200):
        words = f"Which number follows {i * 31} when a {world.sentence(r)} {world.sentence(r)}"
        out.append(" ".join(words.split(" ")[: r.randrange(6, 40)]))
    return out


@pytest.mark.slow
def test_evaluation_items_are_found(clean_rows, questions, doctor, tmp_path):
    r = random.Random(6)
    evaluation = tmp_path / "eval.jsonl"
    evaluation.write_text(
        "".join(json.dumps({"query": f"Question: {q}?", "gold": 1}) + "\n" for q in questions)
    )
    rows = list(clean_rows)
    planted: dict[str, set[int]] = {"contamination": set(), "near_contamination": set()}
    for at in r.sample(range(len(rows)), 120):
        item = r.choice(questions)
        if r.random() < 0.5:
            text, kind = item.upper(), "contamination"
        else:
            item = r.choice([q for q in questions if 18 <= len(q.split()) <= 26])
            words = item.split(" ")
            for place in (4, 13):  # so that no 13 words in a row are left
                words[place] = "however"
            text = " ".join(words)
            kind = "near_contamination"
        rows[at] = {**rows[at], "prompt": f"{rows[at]['prompt']} {text}, please."}
        planted[kind].add(at + 1)
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = doctor(path, evaluations=(Evaluation("quiz", f"jsonl:{evaluation}", "query"),))
    found = lines_of(report, "contamination")
    recall, precision = scores(found, planted["contamination"], set())
    assert recall >= 0.98 and precision >= 0.95
    either = found | lines_of(report, "near_contamination")
    recall, precision = scores(
        either, planted["near_contamination"] | planted["contamination"], set()
    )
    assert recall >= 0.98 and precision >= 0.95


def test_conflicting_answers_are_found(doctor, tmp_path):
    rows = world.made_rows(500, seed=7)
    labelled = [
        {"prompt": row["prompt"], "completion": "yes" if i % 3 else "no"}
        for i, row in enumerate(rows)
    ]
    planted = set()
    for at in range(0, 60, 2):
        flipped = "no" if labelled[at]["completion"] == "yes" else "yes"
        labelled.append({**labelled[at], "completion": flipped})
        planted |= {at + 1, len(labelled)}
    labelled += labelled[300:320]  # repeats are no conflicts
    path = tmp_path / "labels.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in labelled))
    report = doctor(path)
    assert lines_of(report, "conflict") == planted
    assert report["balance"]["labels"]["different"] == 2
    assert {e["value"] for e in report["balance"]["labels"]["top"]} == {"yes", "no"}


def test_word_hashes_are_those_of_the_words():
    texts = ["the cat sat on the mat", "", "on the mat", "a"]
    hashes, text = ngrams.Words(texts).grams(3)
    slow = [
        (i, " ".join(words[j : j + 3]))
        for i, words in enumerate(t.split() for t in texts)
        for j in range(len(words) - 2)
    ]
    assert text.tolist() == [i for i, _ in slow]
    by_words: dict[str, set[int]] = {}
    for (_, gram), value in zip(slow, hashes.tolist(), strict=True):
        by_words.setdefault(gram, set()).add(value)
    assert all(len(values) == 1 for values in by_words.values())
    assert len(set(hashes.tolist())) == len(by_words) == 4
    hashes, starts = ngrams.characters(["hello world", "hi", "hello world"])
    assert np.array_equal(hashes[starts[0] : starts[1]], hashes[starts[2] : starts[3]])
    assert np.diff(starts).tolist() == [7, 1, 7]
