"""Sources, processes, cleaned copies, the report and its page."""

from __future__ import annotations

import gzip
import html.parser
import io
import json

import pytest
from rich.console import Console

from jaxtune.core.errors import RequestError
from jaxtune.data.doctor import kinds, pii
from jaxtune.data.doctor.fix import FIXABLE
from jaxtune.data.doctor.run import Outputs, examine
from jaxtune.data.doctor.settings import Input, Settings
from jaxtune.data.prepare import prepare
from tests.data.doctor import world
from tests.data.doctor.conftest import lines_of


def numbers(report):
    """What does not depend on how the work was divided."""
    return {e["kind"]: (e["count"], e["lines"]) for e in report["findings"]}


@pytest.fixture(scope="module")
def seeded():
    rows = world.made_rows(600, seed=11)
    rows += rows[:5]
    rows += [{**row, "completion": row["completion"] + " Yes."} for row in rows[10:15]]
    return world.plant(rows, 3, seed=12)


@pytest.mark.slow
def test_processes_and_packing_change_nothing(seeded, doctor, tmp_path):
    plain = seeded.write(tmp_path / "rows.jsonl")
    packed = tmp_path / "rows.jsonl.gz"
    packed.write_bytes(gzip.compress(b"\n\n" + plain.read_bytes()))
    one = doctor(plain)
    two = doctor(packed, workers=2)
    shifted = {
        k: (n, {s: [i - 2 for i in at] for s, at in lines.items()})
        for k, (n, lines) in numbers(two).items()
    }
    assert numbers(one) == shifted
    assert one["lengths"] == two["lengths"] and one["balance"] == two["balance"]


def test_arrays_and_datasets_are_read(doctor, tmp_path):
    rows = world.made_rows(40, seed=13)
    rows[7]["completion"] += " Write to a.b@c.org."
    rows.append(rows[3])
    array = tmp_path / "rows.json"
    array.write_text(json.dumps(rows, indent=1))
    report = doctor(array)
    line = next(i for i, text in enumerate(array.read_text().split("\n"), 1) if "a.b@c.org" in text)
    assert lines_of(report, "email") == {line - 2}
    assert len(lines_of(report, "duplicate")) == 1
    lines = tmp_path / "rows.jsonl"
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepare(f"jsonl:{lines}", "completion", tmp_path / "sets", "mine")
    settings = Settings((Input("d", f"tfds:{tmp_path}/sets/mine:train", "completion", "d"),))
    report = examine(settings)
    assert lines_of(report, "email", "d") == {7} and lines_of(report, "duplicate", "d") == {40}


def test_it_shows_how_far_it_is(tmp_path):
    """A bar on a terminal; what is piped gets no bar."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in world.made_rows(30, seed=15)))
    settings = Settings((Input("train", f"jsonl:{path}", "completion", "train"),))
    shown = {}
    for terminal in (True, False):
        console = Console(file=io.StringIO(), force_terminal=terminal, width=80)
        examine(settings, console=console)
        shown[terminal] = console.file.getvalue()
    assert "looking at rows" in shown[True] and "30/30" in shown[True]
    assert shown[False] == ""


def test_a_copy_is_clean_and_says_what_it_lost(seeded, doctor, tmp_path):
    plain = seeded.write(tmp_path / "rows.jsonl")
    out = tmp_path / "clean.jsonl"
    report = doctor(plain, outputs=Outputs(fix=str(out)))
    before = plain.read_bytes().split(b"\n")
    log = [json.loads(line) for line in (tmp_path / "clean.log.jsonl").read_text().splitlines()]
    touched = {entry["line"]: entry for entry in log}
    (fixed,) = report["fixed"]
    kept = out.read_bytes().split(b"\n")[:-1]
    assert fixed["kept"] == len(kept) and fixed["removed"] + fixed["changed"] == len(log)
    # What the log does not name is there byte for byte, in order.
    assert [line for i, line in enumerate(before[:-1], 1) if i not in touched] == [
        line for line in kept if line in set(before)
    ]
    for kind, lines in seeded.planted.items():
        if kinds.BY_NAME[kind].fix == "remove" and kind != "toxic":
            assert {touched[line]["action"] for line in lines} == {"removed"}, kind
        elif kinds.BY_NAME[kind].fix == "change":
            assert {touched[line]["action"] for line in lines} == {"changed"}, kind
    again = doctor(out)
    left = {entry["kind"] for entry in again["findings"]}
    assert not left & (FIXABLE - {"near_duplicate"})
    assert "replacement_character" in left and "near_duplicate" not in left
    duplicate = next(e for e in log if "duplicate" in e["kinds"])
    assert f"{plain}:{duplicate['line'] - 600}" in duplicate["reason"]


def test_only_what_is_asked_for_is_fixed(doctor, tmp_path):
    rows = world.made_rows(20, seed=14)
    rows[2]["completion"] += " Ask a.b@c.org, 4111 1111 1111 1111."
    rows.append(rows[0])
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "out.jsonl"
    doctor(path, outputs=Outputs(fix=str(out), kinds=frozenset({"card"})))
    fixed = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(fixed) == 21 and fixed[2]["completion"].endswith("Ask a.b@c.org, [card].")


def test_a_copy_does_not_replace_its_source(doctor, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"text": "Once"}) + "\n")
    with pytest.raises(RequestError, match="is a source itself"):
        doctor(path, "text", Outputs(fix=str(path)))


def test_chains_of_near_duplicates_keep_one_of_each():
    import numpy as np

    from jaxtune.data.doctor.duplicates import Pairs, near

    pairs = Pairs(np.array([0, 1, 3]), np.array([1, 2, 4]), np.array([0.9, 0.9, 0.85]))
    repeats, leaks, removed = near(pairs, np.array([0, 0, 0, 0, 1]))
    assert repeats.rows.tolist() == [1, 2] and repeats.of.tolist() == [0, 1]
    assert removed.tolist() == [1]  # 2 is near 1 alone, which is gone
    assert leaks.rows.tolist() == [3] and leaks.of.tolist() == [4]


def test_answers_across_groups(doctor, tmp_path):
    rows = []
    for i in range(30):
        for who, answer in (
            ("She", "a good long answer of eight words here"),
            ("He", "a short answer"),
        ):
            rows.append({"prompt": f"{who} asks for {i} apples.", "completion": f"{answer} {i}"})
    rows[1]["completion"] = "I'm sorry, but I can't help with that."
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = doctor(path)["groups"]["gender"]
    assert {n: g["rows"] for n, g in found["groups"].items()} == {"female": 30, "male": 30}
    (pair,) = found["pairs"]
    assert pair["prompts"] == 30 and pair["groups"] == ["female", "male"]
    assert pair["word_difference"] == pytest.approx((29 * 5 + 1) / 30, abs=0.01)
    assert (pair["refuses_only_first"], pair["refuses_only_second"]) == (0, 1)
    table = {"fruit": {"red": ("apples",), "none": ("pears",)}}
    assert list(doctor(path, groups=table)["groups"]) == ["fruit"]


def test_languages_and_fields_are_counted(doctor, tmp_path):
    r = world.random.Random(3)
    rows = [{"text": world.sentence(r), "topic": "abc"[i % 3]} for i in range(60)]
    rows.append(
        {"text": "Die alte Katze sitzt gern vor dem Haus und schläft in der Sonne.", "topic": "a"}
    )
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = doctor(path, "text")
    assert report["common_language"] == "en" and lines_of(report, "other_language") == {61}
    assert {e["value"]: e["count"] for e in report["balance"]["fields"]["topic"]} == {
        "a": 21, "b": 20, "c": 20,
    }  # fmt: skip


class Reader(html.parser.HTMLParser):
    """Notes tags that open and close, what they refer to, and headings."""

    VOID = ("meta", "line", "rect", "polyline", "br")

    def __init__(self):
        super().__init__()
        self.open, self.references, self.words = [], [], []

    def handle_starttag(self, tag, attrs):
        if tag not in self.VOID:
            self.open.append(tag)
        self.references += [v for k, v in attrs if k in ("src", "href", "action")]
        assert tag not in ("script", "link", "img", "iframe")

    def handle_endtag(self, tag):
        assert tag in self.VOID or self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def test_the_page_is_whole_and_self_contained(seeded, doctor, tmp_path):
    path, page, report_path = tmp_path / "rows<b>.jsonl", tmp_path / "r.html", tmp_path / "r.json"
    seeded.write(path)
    outputs = Outputs(html=str(page), json=str(report_path), fix=str(tmp_path / "out.jsonl"))
    report = doctor(path, outputs=outputs)
    assert json.loads(report_path.read_text()) == report
    text = page.read_text()
    reader = Reader()
    reader.feed(text)
    assert reader.open == [] and reader.references == []
    assert "http" not in text and "@import" not in text and "url(" not in text
    assert 'name="viewport"' in text and "prefers-color-scheme: dark" in text and "<svg" in text
    said = " ".join(reader.words)
    for section in ("Findings", "Lengths", "Languages", "Balance", "Groups", "Cleaned copies"):
        assert section in said
    for entry in report["findings"]:
        assert entry["kind"] in said
    assert "rows<b>.jsonl" in said and "rows<b>" not in text


def test_reports_mask_what_is_personal(doctor, tmp_path):
    r = world.random.Random(21)
    things = [
        getattr(world, kind)(r)
        for kind in ("email", "phone", "card", "iban", "secret")
        for _ in range(20)
    ]
    rows = [{"text": f"Dear all, here it is: {thing} and nothing else."} for thing in things]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    outputs = Outputs(html=str(tmp_path / "r.html"))
    written = json.dumps(doctor(path, "text", outputs)) + (tmp_path / "r.html").read_text()
    assert not [thing for thing in things if thing in written or thing[:20] in written]


@pytest.mark.parametrize(
    ("text", "kinds_found"),
    [
        ("Call 1-800-555-0199 now", ["phone"]),
        ("It costs 1234567890 or 3.14159265358979 or 2021-03-15 10:22:33", []),
        ("sum 4111111111111112", []),  # wrong checksum
        ("IBAN DE89 3704 0044 0532 0130 00 IS MINE", ["iban"]),
        ("IBAN DE88 3704 0044 0532 0130 00", []),
        ("version 1.2.3.4 at user@host and @handle", []),
        ("the sk-learn library, task-oriented-dialogue-systems", []),
        ("a.b+c@mail.example.co.uk!", ["email"]),
    ],
)  # fmt: skip
def test_personal_data_by_form_and_checksum(text, kinds_found):
    assert [match.kind for match in pii.find(text)] == kinds_found


def test_the_page_of_the_docs_has_the_registry():
    from pathlib import Path

    page = Path(__file__).resolve().parents[3] / "docs/doctor.md"
    assert kinds.markdown_table() in page.read_text()
    assert len(kinds.ALL) <= 64 and len(kinds.BY_NAME) == len(kinds.ALL)
