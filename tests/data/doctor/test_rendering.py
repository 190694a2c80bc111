"""What the doctor sees through the renderer: BOS, terminators, templates, lengths."""

from __future__ import annotations

import json

import numpy as np
import pytest

from jaxtune.data.doctor import lengths
from jaxtune.data.packing import pack
from jaxtune.data.tokenizer import load_tokenizer
from tests.data.conftest import TEMPLATES, write_tokenizer
from tests.data.doctor.conftest import lines_of


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def put(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_ids_with_a_fault_are_found(doctor, directory, tmp_path):
    tokenizer = load_tokenizer(directory)
    bos, eos = tokenizer.bos_id, tokenizer.eos_id
    words = tokenizer.encode("the cat sat on the mat", special=False)
    good = [bos, *words, eos]
    rows = [
        {"input_ids": good},
        {"input_ids": [bos, *good]},  # 2
        {"input_ids": [bos, *words]},  # 3
        {"input_ids": good, "loss_mask": [1] * len(words) + [1, 0]},  # 4: pad = eos masked it
        {"input_ids": good, "loss_mask": [0] * len(good)},  # 5
        {"input_ids": [bos, 10**6, eos]},  # 6
        {"input_ids": []},  # 7
        {"input_ids": good, "loss_mask": [0, 0, *[1] * (len(good) - 2)]},
    ]
    report = doctor(put(tmp_path / "ids.jsonl", rows), "tokens", tokenizer=str(directory))
    assert lines_of(report, "doubled_bos") == {2}
    assert lines_of(report, "missing_terminator") == {3, 4}
    assert lines_of(report, "no_target") == {5}
    assert lines_of(report, "malformed") == {6}
    assert lines_of(report, "empty_target") == {7}
    masked = next(e for e in report["findings"] if e["kind"] == "missing_terminator")
    assert "masked" in masked["examples"][1]["detail"]


def talk(*roles):
    said = {"system": "Be kind.", "user": "How old is the cat?", "assistant": "It is two."}
    return {"messages": [{"role": role, "content": said.get(role, "7")} for role in roles]}


def test_roles_out_of_order_are_found(doctor, directory, tmp_path):
    template = tmp_path / "gemma.jinja"
    template.write_text(TEMPLATES["gemma"])
    rows = [
        talk("user", "assistant"),
        talk("user", "assistant", "user"),  # 2
        talk("user", "system", "assistant"),  # 3
        talk("user", "assistant", "system", "user", "assistant"),  # 4
        {"messages": [{"role": "wizard", "content": "Hocus."}]},  # 5
        talk("user", "tool", "assistant"),  # 6
        talk("assistant", "user", "assistant"),  # 7
        talk("user", "user", "assistant"),  # 8
        talk("system", "user", "assistant"),  # 9: this template has no system role
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": " "}]},
        talk("user", "assistant", "user", "assistant"),
    ]
    path = put(tmp_path / "chat.jsonl", rows)
    report = doctor(path, "chat", tokenizer=str(directory), template=str(template))
    assert lines_of(report, "role_order") == {2, 3, 4, 5, 6}
    assert lines_of(report, "turn_order") == {7, 8}
    assert lines_of(report, "template_refused") == {9}
    assert lines_of(report, "empty_target") == {10}
    assert lines_of(report, "missing_terminator") == set()


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_what_the_renderer_writes_has_no_fault(name, doctor, directory, tmp_path):
    template = tmp_path / "template.jinja"
    template.write_text(TEMPLATES[name])
    rows = [talk("user", "assistant"), talk("user", "assistant", "user", "assistant")]
    rows[0]["messages"][0]["content"] = "Where is the dog?"
    path = put(tmp_path / "chat.jsonl", rows)
    report = doctor(path, "chat", tokenizer=str(directory), template=str(template))
    found = {entry["kind"] for entry in report["findings"]}
    assert not found & {"missing_terminator", "doubled_bos", "no_target", "template_refused"}


def test_a_beginning_written_out_is_doubled(doctor, directory, tmp_path):
    rows = [{"text": "<s>Once upon a time"}, {"text": "There was a dog"}]
    report = doctor(put(tmp_path / "t.jsonl", rows), "text", tokenizer=str(directory))
    assert lines_of(report, "doubled_bos") == lines_of(report, "special_token") == {1}


def test_lengths_are_those_of_the_tokenizer(doctor, directory, tmp_path):
    tokenizer = load_tokenizer(directory)
    rows = [{"prompt": "a " * (5 * i), "completion": "the cat " * i} for i in range(1, 40)]
    path = put(tmp_path / "t.jsonl", rows)
    report = doctor(path, tokenizer=str(directory), seq_len=100)
    true = np.array([len(tokenizer.encode(row["prompt"] + row["completion"])) + 1 for row in rows])
    found = report["lengths"]["train"]
    assert found["tokens"]["total"] == true.sum() and found["tokens"]["max"] == true.max()
    assert sum(found["tokens"]["histogram"]["counts"]) == len(rows)
    cut = np.minimum(true, 100)
    fit = found["fit"]
    assert fit["overlong"] == (true > 100).sum() == len(lines_of(report, "overlong"))
    assert fit["tokens_cut"] == (true - cut).sum()
    assert fit["padding_share"] == pytest.approx(1 - cut.sum() / (100 * len(rows)), abs=1e-4)
    assert fit["packed_rows"] == len(pack(cut, 100, seed=0))
    assert fit["packing_efficiency"] == pytest.approx(
        cut.sum() / (100 * fit["packed_rows"]), abs=1e-4
    )
    prompts = np.array([len(tokenizer.encode(row["prompt"])) for row in rows])
    lost = lines_of(report, "target_lost")
    assert {i + 1 for i in np.flatnonzero(prompts > 101)} <= lost
    assert lost <= {i + 1 for i in np.flatnonzero(prompts >= 99)}


def test_a_histogram_holds_every_row():
    values = np.array([3, 3, 4, 10, 500, 501, 100_000])
    found = lengths.describe(values)
    assert sum(found["histogram"]["counts"]) == 7
    assert len(found["histogram"]["edges"]) == len(found["histogram"]["counts"]) + 1
    assert lengths.describe(np.zeros(0, np.int32)) == {"count": 0}
    assert sum(lengths.describe(np.array([5, 5, 5]))["histogram"]["counts"]) == 3


PAIRS = {
    "preference": [
        {"prompt": "Which pet?", "chosen": "The cat sat.", "rejected": "The dog ran."},
        {
            "prompt": "Which pet?",
            "chosen": "The dog ran.",
            "rejected": "The cat sat.",
        },  # 2: flipped
        {"prompt": "Which pet?", "chosen": "The cat sat.", "rejected": "No pet at all."},
        {"prompt": "Which food?", "chosen": "Milk.", "rejected": "Milk."},  # 4
        {"prompt": "Where to?", "chosen": " ", "rejected": "The moon."},  # 5
    ],
    "unpaired": [
        {"prompt": "Which pet?", "completion": "The cat sat.", "label": True},
        {"prompt": "Which pet?", "completion": "The cat sat.", "label": False},  # 2
        {"prompt": "Which pet?", "completion": "The dog ran.", "label": False},
    ],
    "ranked": [{"prompt": "Which pet?", "completions": ["The cat.", "The dog.", "The moon."]}],
    "stepwise": [{"prompt": "Two and two?", "completions": ["Two.", "Four."], "labels": [1, 1]}],
    "prompt": [{"prompt": "Which pet?"}, {"prompt": [{"role": "user", "content": "Hello there"}]}],
}


@pytest.mark.parametrize("format", sorted(PAIRS))
def test_every_format_is_read(format, doctor, directory, tmp_path):
    template = tmp_path / "template.jinja"
    template.write_text(TEMPLATES["chatml"])
    path = put(tmp_path / "rows.jsonl", PAIRS[format])
    report = doctor(path, format, tokenizer=str(directory), template=str(template), seq_len=64)
    flipped = {1, 2} if format in ("preference", "unpaired") else set()
    assert lines_of(report, "conflict") == flipped
    preference = format == "preference"
    assert lines_of(report, "same_pair") == ({4} if preference else set())
    assert lines_of(report, "empty_target") == ({5} if preference else set())
    expected = {"conflict", "same_pair", "empty_target", "near_duplicate", "turn_order"}
    assert {entry["kind"] for entry in report["findings"]} <= expected
    tokens = report["lengths"]["train"]["tokens"]
    assert tokens["count"] == (3 if preference else len(PAIRS[format]))
    if preference:  # both sides stand in the row, each with the prompt
        pair = PAIRS[format][0]
        sides = [
            len(load_tokenizer(directory).encode(pair["prompt"] + pair[s])) + 1
            for s in ("chosen", "rejected")
        ]
        assert tokens["max"] >= sum(sides)
