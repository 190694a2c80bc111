"""Fingerprints of files: every byte counts, in small files and in large ones."""

import hashlib

import numpy as np
import pytest

from jaxtune.checkpoints import fingerprint
from jaxtune.checkpoints.fingerprint import fingerprint_files


@pytest.mark.parametrize("size", [0, 1, 99, 100, 101, 1000, 1042])
def test_every_byte_counts(size, tmp_path, monkeypatch):
    monkeypatch.setattr(fingerprint, "PIECE", 100)
    monkeypatch.setattr(fingerprint, "BLOCK", 7)
    content = np.random.default_rng(0).integers(0, 256, size, np.uint8)
    path = tmp_path / "model.safetensors"
    path.write_bytes(content.tobytes())
    before = fingerprint_files([path])
    assert before == by_hand(path.name, content.tobytes()) == fingerprint_files([path])
    for place in range(0, size, 41):
        content[place] ^= 1
        path.write_bytes(content.tobytes())
        assert fingerprint_files([path]) != before, place
        content[place] ^= 1


def by_hand(name: str, content: bytes) -> str:
    """The hash of one file, in one piece after the other."""
    digest = hashlib.blake2b(f"{name}:{len(content)};".encode(), digest_size=16)
    pieces = [content[i : i + 100] for i in range(0, len(content), 100)]
    large = len(content) > 100
    for piece in pieces:
        digest.update(hashlib.sha256(piece).digest() if large else piece)
    return digest.hexdigest()


def test_names_count_and_the_order_of_the_paths_does_not(tmp_path):
    paths = [tmp_path / name for name in ("b", "a", "c")]
    for path in paths:
        path.write_bytes(b"same")
    assert fingerprint_files(paths) == fingerprint_files(sorted(paths))
    assert fingerprint_files(paths[:1]) != fingerprint_files(paths[1:2])
