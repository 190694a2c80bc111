"""`data prepare`: what is read back equals the JSON lines, and nothing is half written."""

from __future__ import annotations

import subprocess
import sys

import pytest

from jaxtune.core.errors import RequestError
from jaxtune.data.prepare import prepare, split_records
from jaxtune.data.sources import open_source
from jaxtune.data.store import tokenize

CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"a": [1, None]}}}],
}
ASK, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
RECORDS = {
    "text": [{"text": "one\n\nté日"}, {"text": "two", "meta": {"id": 1, "tags": []}}],
    "completion": [{"prompt": "", "completion": "y"}, {"prompt": "p", "completion": "q", "n": 1.5}],
    "instruction": [
        {"instruction": "a", "input": "", "output": "b"},
        {"instruction": "a", "output": "b"},
        {"instruction": "a", "input": None, "output": "b", "extra": None},
    ],
    "chat": [
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
        {
            "messages": [
                {"role": "system", "content": ""},
                {"role": "user", "content": "é", "name": "bob"},
                CALL,
                {"role": "tool", "content": "{}", "tool_call_id": "x"},
                {"role": "assistant", "content": "done"},
            ],
            "tools": [{"type": "function", "function": {"name": "f"}}],
            "source": "here",
        },
    ],
    "tokens": [
        {"input_ids": [1, 2, 3]},
        {"input_ids": [4, 5], "loss_mask": [0, 0.1]},
        {"input_ids": [4, 5], "loss_mask": [0, 1], "id": "z"},
    ],
    "preference": [
        {"prompt": "p", "chosen": "a", "rejected": "b", "margin": 0.5},
        {
            "prompt": [ASK],
            "chosen": [ANSWER],
            "rejected": [{**ANSWER, "content": "b"}],
            "weight": None,
        },
        {"chosen": [ASK, ANSWER], "rejected": [ASK, {**ANSWER, "content": "b"}]},
        {"chosen": "one two", "rejected": "one three"},
    ],
    "unpaired": [
        {"prompt": "p", "completion": "a", "label": True},
        {"prompt": [ASK], "completion": [ANSWER], "label": 0},
    ],
    "ranked": [{"prompt": [ASK], "completions": ["a", "b", "c"], "scores": [1, 2.5, -3]}],
    "stepwise": [{"prompt": "p", "completions": ["a", "b"], "labels": [True, False]}],
    "prompt": [{"prompt": "p", "answer": 3}, {"prompt": [ASK], "answer": [1, {"a": None}]}],
}


@pytest.mark.parametrize("format", RECORDS)
def test_reading_back_gives_the_json_records(tmp_path, write_jsonl, format):
    records = RECORDS[format]
    source = write_jsonl(tmp_path / "a.jsonl", records)
    made = prepare(source, format, tmp_path / "out", f"my_{format}")
    assert made["splits"] == {"train": len(records)}
    for name in (made["directory"], tmp_path / "out" / f"my_{format}"):
        back = open_source(f"tfds:{name}:train")
        assert [back[i] for i in range(len(back))] == records
    sliced = open_source(f"tfds:{made['directory']}:train[:1]")
    assert [sliced[i] for i in range(len(sliced))] == records[:1]


def test_training_data_is_the_same_from_both(tmp_path, write_jsonl, chat):
    source = write_jsonl(tmp_path / "a.jsonl", RECORDS["chat"])
    made = prepare(source, "chat", tmp_path, "talks")
    stores = [
        tokenize(open_source(name), "chat", chat("thinking"), seq_len=256)
        for name in (source, f"tfds:{made['directory']}:train")
    ]
    assert stores[0].fingerprint() == stores[1].fingerprint()


def test_splits_divide_the_records(tmp_path, write_jsonl):
    records = [{"text": f"t{i}"} for i in range(100)]
    source = write_jsonl(tmp_path / "a.jsonl.gz", records)
    splits = {"train": 0.8, "test": 0.2}
    made = prepare(source, "text", tmp_path, "texts", splits=splits, seed=3)
    assert made["splits"] == {"train": 80, "test": 20}
    train, test = (open_source(f"tfds:{tmp_path / 'texts'}:{s}") for s in splits)
    seen = [s[i]["text"] for s in (train, test) for i in range(len(s))]
    assert sorted(seen) == sorted(r["text"] for r in records)
    assert seen[:80] != [r["text"] for r in records[:80]]
    parts, again, other = (split_records(100, splits, seed) for seed in (3, 3, 4))
    assert parts["test"].tolist() == again["test"].tolist() != other["test"].tolist()
    assert [records[i]["text"] for i in parts["test"]] == seen[80:]


def test_a_dataset_is_found_by_name_below_the_data_directory(tmp_path, write_jsonl, monkeypatch):
    source = write_jsonl(tmp_path / "a.jsonl", RECORDS["text"])
    prepare(source, "text", tmp_path, "texts")
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    for name in ("texts:train", "texts:1.0.0:train"):
        opened = open_source(f"tfds:{name}")
        assert len(opened) == 2 and opened.where(1) == f"tfds:{name}[1]"
    for name, message in {
        "text:train": "did you mean 'texts'",
        "texts:test": "no split 'test'.* train",
        "texts:2.0.0:train": "no version '2.0.0'; it has 1.0.0",
        "texts": "must read tfds:NAME",
        "texts:train[": "must read",
        "texts:train[5:2%zz]": "cannot be read",
    }.items():
        with pytest.raises(RequestError, match=message):
            open_source(f"tfds:{name}")
    (tmp_path / "texts" / "1.0.0" / "dataset_info.json").write_text("{")
    with pytest.raises(RequestError, match="not a readable"):
        open_source("tfds:texts:train")


def test_nothing_is_overwritten_or_half_written(tmp_path, write_jsonl):
    good = write_jsonl(tmp_path / "a.jsonl", RECORDS["text"])
    bad = write_jsonl(tmp_path / "b.jsonl", [{"text": "x"}, {"text": ""}])
    out = tmp_path / "out"
    with pytest.raises(RequestError, match="nothing to train") as error:
        prepare(bad, "text", out, "texts")
    assert error.value.where == f"{tmp_path / 'b.jsonl'}:2"
    assert not out.exists()
    prepare(good, "text", out, "texts")
    before = sorted(out.rglob("*"))
    with pytest.raises(RequestError, match="exists already"):
        prepare(good, "text", out, "texts")
    assert sorted(out.rglob("*")) == before
    assert [p.name for p in out.iterdir()] == ["texts"]


def test_bad_requests(tmp_path, write_jsonl):
    source = write_jsonl(tmp_path / "a.jsonl", RECORDS["text"])
    for kwargs, message in (
        ({"name": "My-Data"}, "lower-case"),
        ({"splits": {"train": 0.8}}, "sum to 1"),
        ({"splits": {"train": 1.5, "test": -0.5}}, "positive"),
        ({"splits": {"train": 0.99, "test": 0.01}}, "none of 2"),
        ({"splits": {"a b": 1.0}}, "no name"),
        ({"format": "txt"}, "did you mean 'text'"),
        ({"out_dir": tmp_path / "a.jsonl"}, "cannot be made"),
    ):
        request = {"format": "text", "out_dir": tmp_path / "o", "name": "n"} | kwargs
        with pytest.raises(RequestError, match=message):
            prepare(source, **request)


def test_tensorflow_is_not_imported(tmp_path, write_jsonl):
    source = write_jsonl(tmp_path / "a.jsonl", RECORDS["text"])
    program = (
        "import sys\n"
        "from jaxtune.data.prepare import prepare\nfrom jaxtune.data.sources import open_source\n"
        f"made = prepare({source!r}, 'text', {str(tmp_path)!r}, 'texts')\n"
        "assert open_source('tfds:' + made['directory'] + ':train')[1]['text'] == 'two'\n"
        "assert not {'tensorflow', 'torch'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
