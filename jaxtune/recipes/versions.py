"""What software a run was made with."""

from __future__ import annotations

import functools
import hashlib
from importlib import metadata
from pathlib import Path

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "transformers")


def versions() -> dict[str, str]:
    """Returns the versions of the packages that decide the numbers."""
    return {name: metadata.version(name) for name in PACKAGES}


@functools.cache
def code_fingerprint() -> str:
    """Returns a hash of jaxtune's own source, in hexadecimal."""
    root = Path(__file__).resolve().parents[1]
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()
