"""Orbax on `s3://`, which it does not know by itself: TensorStore, beneath it, does.

Orbax (0.12.8) turns a path into a TensorStore spec in three functions, which tell `gs://` from a
file. Here they learn a third kind; `tests/checkpoints/test_stores.py` fails where they changed.
"""

from __future__ import annotations

import functools
import os
import posixpath
from typing import Any

S3 = "s3://"


def spec(path: str) -> dict[str, Any]:
    """Returns TensorStore's spec of a key-value store at `s3://BUCKET/PREFIX`.

    $AWS_ENDPOINT_URL names another service than Amazon's, and $AWS_REGION the region, as for all
    of AWS's own tools; credentials come from the usual places.
    """
    bucket, _, prefix = path.removeprefix(S3).partition("/")
    found: dict[str, Any] = {"driver": "s3", "bucket": bucket, "path": prefix.rstrip("/")}
    if region := os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION"):
        found["aws_region"] = region
    if endpoint := os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL"):
        found["endpoint"] = endpoint
    return found


@functools.cache
def teach_orbax() -> None:
    """Lets Orbax read and write arrays at `s3://` paths."""
    from orbax.checkpoint._src.path import gcs_utils
    from orbax.checkpoint._src.serialization import tensorstore_utils

    normalize, in_store = tensorstore_utils._normalize_path, tensorstore_utils._use_gcs_driver
    gcs_spec = gcs_utils.get_kvstore_for_gcs

    def normalized(path: str) -> str:
        if not path.startswith(S3):
            return normalize(path)
        return S3 + posixpath.normpath(path.removeprefix(S3))

    def stored(path: str) -> bool:
        return path.startswith(S3) or in_store(path)

    def spec_of(path: str) -> dict[str, Any]:
        return spec(path) if path.startswith(S3) else gcs_spec(path)

    tensorstore_utils._normalize_path = normalized
    tensorstore_utils._use_gcs_driver = stored
    gcs_utils.get_kvstore_for_gcs = spec_of
