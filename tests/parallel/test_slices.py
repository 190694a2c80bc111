"""Steps compiled for two TPU slices: the network between them carries gradients alone."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs jax[tpu]"),
]


@pytest.fixture(scope="module")
def report():
    command = [sys.executable, "-m", "tests.parallel.slices_program"]
    done = subprocess.run(
        command,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def test_the_mesh_is_jaxs_own_hybrid_one(report):
    assert report["as jax"]
    sizes = {"data": 2, "fsdp": 2, "tensor": 2, "sequence": 1, "expert": 1}
    assert report["shape"] == sizes


@pytest.mark.parametrize("method", ["full", "lora"])
def test_only_sums_of_gradients_and_of_metrics_cross_between_slices(report, method):
    """TPU arrays are padded to tiles, so sizes are compared with room."""
    kinds = [kind for kind, _ in report[method]["crossing"]]
    assert set(kinds) == {"ALL_REDUCE"}
    # What is in the layers' loop is sent for each layer; here it is counted once.
    sent = sum(elements for _, elements in report[method]["crossing"])
    trained = report[method]["trained"]
    assert trained / 3 < sent < trained + 20 * 1024


def test_frozen_weights_do_not_cross(report):
    most = max(elements for _, elements in report["lora"]["crossing"])
    assert most < report["full"]["trained"] / 5
