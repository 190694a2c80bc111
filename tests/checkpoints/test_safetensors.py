import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxtune.checkpoints.safetensors import TensorWriter, open_tensors
from jaxtune.core.errors import RequestError

RNG = np.random.default_rng(0)
TENSORS = {
    "a": RNG.standard_normal((5, 7)).astype(np.float32),
    "b": RNG.standard_normal((3,)).astype(ml_dtypes.bfloat16),
    "c": RNG.standard_normal((2, 3, 4)).astype(np.float16),
    "d": np.array(3.0, np.float32),
    "e": np.zeros((0, 4), np.float32),
    "f": np.arange(6, dtype=np.int64),
}


def test_reads_what_the_library_writes(tmp_path):
    save_file(TENSORS, tmp_path / "x.safetensors", metadata={"format": "pt"})
    file = open_tensors(tmp_path / "x.safetensors")
    assert set(file.entries) == set(TENSORS)
    for name, tensor in TENSORS.items():
        read = file.read(name)
        assert (read.dtype, read.shape) == (tensor.dtype, tensor.shape)
        assert read.tobytes() == tensor.tobytes()
    part = file.read("a", (slice(1, 3), slice(2, 7)))
    assert np.array_equal(part, TENSORS["a"][1:3, 2:7])
    assert part.flags.owndata and part.flags.writeable  # a copy, not the mapped file
    assert np.array_equal(file.read("b", (slice(0, 2),)), TENSORS["b"][:2])


def test_the_library_reads_what_is_written_in_any_order(tmp_path):
    path = tmp_path / "x.safetensors"
    shapes = {name: (tensor.dtype, tensor.shape) for name, tensor in TENSORS.items()}
    with TensorWriter(path, shapes) as writer:
        for name in reversed(TENSORS):
            writer.write(name, TENSORS[name])
    loaded = load_file(path)
    assert all(loaded[name].tobytes() == TENSORS[name].tobytes() for name in TENSORS)
    assert set(loaded) == set(open_tensors(path).entries) == set(TENSORS)


def test_writer_casts_and_takes_transposed_views(tmp_path):
    path, value = tmp_path / "x.safetensors", TENSORS["a"]
    with TensorWriter(path, {"t": (np.dtype(ml_dtypes.bfloat16), (7, 5))}) as writer:
        writer.write("t", value.T)
    assert np.array_equal(open_tensors(path).read("t"), value.T.astype(ml_dtypes.bfloat16))


def test_writer_refuses_an_incomplete_or_misshapen_file(tmp_path):
    path, shapes = tmp_path / "x.safetensors", {"a": (np.dtype(np.float32), (5, 7))}
    with pytest.raises(ValueError, match="never written"), TensorWriter(path, shapes):
        pass
    with pytest.raises(ValueError, match="declared was"), TensorWriter(path, shapes) as writer:
        writer.write("a", TENSORS["a"].T)
    with TensorWriter(path, shapes) as writer:
        writer.write("a", TENSORS["a"])
        with pytest.raises(ValueError, match="twice"):
            writer.write("a", TENSORS["a"])


def pack(header: object, size: int) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(size)


def entry(start: int, stop: int, shape=(2,), dtype="F32") -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "end inside the header"),
        (b"\x10\x00\x00", "end inside the header"),
        ((10**9).to_bytes(8, "little") + b"{}", "end inside the header"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
        (pack(b"not json", 0), "no JSON"),
        (pack(b"\xff\xfe", 0), "no JSON"),
        (pack([], 0), "no JSON"),
        (pack(b"[" * 200_000, 0), "no JSON"),
        (pack(b'{"a": {"dtype": "F32", "shape": [1e400], "data_offsets": [0, 4]}}', 4), "wrongly"),
        (pack({"a": entry(0, 8, (2.0,))}, 8), "described wrongly"),
        (pack({"a": entry(0, 8, dtype=["F32"])}, 8), r"dtype \['F32'\]"),
        (pack({"a": entry(0, 8)}, 7), "truncated"),
        (pack({"a": entry(0, 8)}, 9), "damaged"),
        (pack({"a": entry(4, 12)}, 12), "overlaps or leaves a gap"),
        (pack({"a": entry(0, 8), "b": entry(4, 12)}, 12), "overlaps or leaves a gap"),
        (pack({"a": entry(0, 8, (3,))}, 8), "does not fill its bytes"),
        (pack({"a": entry(0, 8, (-2, -1))}, 8), "does not fill its bytes"),
        (pack({"a": {"dtype": "F32"}}, 8), "described wrongly"),
        (pack({"a": 3}, 8), "described wrongly"),
        (pack({"a": entry(0, 8, dtype="F4")}, 8), "dtype 'F4'"),
    ],
)
def test_damaged_files_are_refused(content, message, tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(RequestError, match=message) as error:
        open_tensors(path)
    assert error.value.where == str(path)


def test_missing_file_is_refused(tmp_path):
    with pytest.raises(RequestError, match="no such file"):
        open_tensors(tmp_path / "x.safetensors")
