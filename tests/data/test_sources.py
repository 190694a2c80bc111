"""Sources: every defect of a file is found when it is opened, and its line is named."""

from __future__ import annotations

import gzip
import json

import pytest

from jaxtune.core.errors import RequestError
from jaxtune.data.sources import open_source


def write(path, data: bytes | str):
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def test_jsonl_reads_objects_and_knows_their_lines(tmp_path):
    path = write(tmp_path / "a.jsonl", '\ufeff{"a": 1}\r\n\n{"a": "é"}\n   \n{"a": null}')
    source = open_source(f"jsonl:{path}")
    assert len(source) == 3
    assert [source[i]["a"] for i in range(3)] == [1, "é", None]
    assert [source.where(i) for i in range(3)] == [f"{path}:1", f"{path}:3", f"{path}:5"]


def test_gzip_by_content_and_by_name(tmp_path):
    data = gzip.compress(b'{"a": 1}\n')
    for name in ("a.jsonl.gz", "b.jsonl"):
        assert open_source(f"jsonl:{write(tmp_path / name, data)}")[0] == {"a": 1}


def test_a_json_array_is_read_with_lines_and_indices(tmp_path):
    text = '\ufeff\n[ {"a": "[1,\\n2]"}, {"a": {}},\n\n  {\n"a": 3}\n]\n'
    path = write(tmp_path / "a.json", text)
    source = open_source(f"jsonl:{path}")
    assert [source[i]["a"] for i in range(3)] == ["[1,\n2]", {}, 3]
    assert [source.where(i) for i in range(3)] == [f"{path}:2[0]", f"{path}:2[1]", f"{path}:4[2]"]
    pretty = write(tmp_path / "b.json", json.dumps([{"a": i} for i in range(9)], indent=2))
    assert open_source(f"jsonl:{pretty}").where(8) == f"{pretty}:26[8]"


def test_text_is_one_document(tmp_path):
    path = write(tmp_path / "a.txt", "one\n\ntwo\n")
    source = open_source(f"text:{path}")
    assert len(source) == 1 and source[0] == {"text": "one\n\ntwo\n"}
    with pytest.raises(IndexError):
        source[1]


GOOD = b'{"a": 1}\n'
BAD_FILES = {
    "bad json": (GOOD + b'{"a": }\n', "a.jsonl", ":2", "not valid JSON"),
    "cut off": (GOOD + GOOD + b'{"a": ', "a.jsonl", ":3", "not valid JSON"),
    "not an object": (GOOD + b"[1]\n", "a.jsonl", ":2", "array, not an object"),
    "a string": (b'"a"\n', "a.jsonl", ":1", "string, not an object"),
    "array cut off": (b'[\n{"a": 1},\n', "a.json", ":3", "not a valid JSON array"),
    "array not closed": (b'[\n{"a": 1}\n', "a.json", ":3", "expected a comma"),
    "array of strings": (b'[{"a": 1},\n"b"]', "a.json", ":2[1]", "string, not an object"),
    "array with bad json": (b'[\n{"a": 1},\n{"a": }]', "a.json", ":3", "Expecting value"),
    "array with a comma": (b'[\n{"a": 1},\n]', "a.json", ":3", "a comma before"),
    "two arrays": (b'[{"a": 1}]\n[{"a": 1}]', "a.json", ":2", "follows its closing bracket"),
    "array of nothing": (b"[ ]", "a.json", "", "no record"),
    "deep array": (b"[" * 100_000, "a.json", ":1", "not a valid JSON array"),
    "half a surrogate in an array": (b'[{"a": "\\ud83d"}]', "a.json", ":1[0]", "surrogate"),
    "empty": (b"", "a.jsonl", "", "no record"),
    "blank": (b"\n \n", "a.jsonl", "", "no record"),
    "latin-1": (GOOD + b'{"a": "\xe9"}\n', "a.jsonl", ":2", "not UTF-8"),
    "half a surrogate": (GOOD + b'{"a": "\\ud83d"}', "a.jsonl", ":2", "surrogate"),
    "not gzip": (GOOD, "a.jsonl.gz", "", "not a gzip file"),
    "cut gzip": (gzip.compress(GOOD * 99)[:-12], "a.jsonl.gz", "", "damaged gzip"),
    "flipped gzip": (gzip.compress(b"abc" * 99)[:-8] + b"\0" * 8, "a.jsonl.gz", "", "damaged gzip"),
    "deep": (b'{"a":' + b"[" * 100_000, "a.jsonl", ":1", "not valid JSON"),
    "binary": (b"\x89PNG\r\n\x1a\n\0\0", "a.jsonl", ":1", "not UTF-8"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_file_is_named_with_its_line(tmp_path, case):
    data, name, line, message = BAD_FILES[case]
    path = write(tmp_path / name, data)
    with pytest.raises(RequestError, match=message) as error:
        open_source(f"jsonl:{path}", key="data.train[0].source")
    assert error.value.where == f"{path}{line}"
    assert error.value.key == "data.train[0].source"
    assert "\n" not in str(error.value)


def test_bad_text(tmp_path):
    path = write(tmp_path / "a", " \n")
    with pytest.raises(RequestError, match="empty"):
        open_source(f"text:{path}")
    path = write(tmp_path / "b", b"ok\nok\n\xff")
    with pytest.raises(RequestError, match="not UTF-8") as error:
        open_source(f"text:{path}")
    assert error.value.where == f"{path}:3"


def test_missing_paths_and_unknown_kinds(tmp_path):
    write(tmp_path / "train.jsonl", GOOD)
    with pytest.raises(RequestError, match=r"no such file \(did you mean 'train.jsonl'"):
        open_source(f"jsonl:{tmp_path / 'trian.jsonl'}")
    with pytest.raises(RequestError, match="no such file"):
        open_source(f"jsonl:{tmp_path / 'nowhere' / 'a.jsonl'}")
    with pytest.raises(RequestError, match="directory"):
        open_source(f"jsonl:{tmp_path}")
    with pytest.raises(RequestError, match="did you mean 'jsonl'"):
        open_source("json:a.jsonl")
    for source in ("a.jsonl", "jsonl:", "", "jsonl"):
        with pytest.raises(RequestError):
            open_source(source)


def test_real_data(shared, tmp_path):
    path = shared / "data" / "math" / "gsm8k_train.jsonl.gz"
    source = open_source(f"jsonl:{path}")
    assert len(source) == 7473 and set(source[0]) == {"question", "answer"}
    path = shared / "data" / "instruction" / "rasbt_instruction_1100.json.gz"
    rows = json.loads(gzip.decompress(path.read_bytes()))
    source = open_source(f"jsonl:{path}")
    assert [source[i] for i in range(len(source))] == rows and len(rows) == 1100
    assert source.where(1) == f"{path}:7[1]"
