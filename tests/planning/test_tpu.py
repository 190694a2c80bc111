"""The real step, compiled for TPU slices that are not here (libtpu alone is needed).

Three runs as people have them; each is compiled once, in a process of its own, by the verb.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from jaxtune.core.tree import flatten
from jaxtune.models.decoder import abstract_params
from jaxtune.models.presets import preset
from jaxtune.peft.method import Method

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None,
        reason='compiling for a TPU needs libtpu: pip install "jax[tpu]"',
    ),
]

ROOT = Path(__file__).resolve().parents[2]
TOKENS = 8192
GIB = 2**30
# preset, method, topology, chips, HBM bytes of a chip, further flags. The 70B program has the same
# memory with the least effort, and is compiled three times as fast.
RUNS = {
    "8B LoRA": ("llama3.1-8b", "lora", "v5e:4x4", 16, 16 * GIB, ()),
    "70B LoRA": ("llama3.1-70b", "lora", "v5p:4x4x4", 64, 95 * GIB, ("--quick",)),
    "8B full": ("llama3.1-8b", "full", "v5p:2x2x4", 16, 95 * GIB, ()),
}


def config_of(name: str) -> dict[str, Any]:
    """One row of 8,192 tokens a chip."""
    model, method, _, chips, *_ = RUNS[name]
    return {
        "model": {"preset": model, "remat": "block"},
        "peft": {"method": method},
        "data": {"train": [{"format": "chat"}], "seq_len": TOKENS},
        "batch_size": chips,
        "total_steps": 1000,
        "optim": {"lr": 1e-4},
    }


@pytest.fixture(scope="module")
def plans(tmp_path_factory) -> dict[str, dict[str, Any]]:
    """Returns the printed object of each run, all compiled at once.

    The verb makes its own environment; that of the tests would change the compiler.
    """
    directory = tmp_path_factory.mktemp("plans")
    ours = ("JAX_", "XLA_", "TPU_")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
    running = {}
    for i, name in enumerate(RUNS):
        path = directory / f"{i}.json"
        path.write_text(json.dumps(config_of(name)))
        command = [sys.executable, "-m", "jaxtune.cli.main", "plan", f"--config={path}"]
        command += [f"--topology={RUNS[name][2]}", "--json", *RUNS[name][5]]
        running[name] = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
    found = {}
    for name, process in running.items():
        out, error = process.communicate()
        assert process.returncode == 0, error
        found[name] = json.loads(out)
    return found


@pytest.fixture(params=RUNS)
def run(request, plans) -> tuple[str, dict[str, Any]]:
    return request.param, plans[request.param]


def test_it_fits_the_memory_of_a_chip(run):
    name, plan = run
    assert plan["fits"] and plan["headroom_bytes"] > 0
    assert plan["devices"]["count"] == RUNS[name][3]
    assert plan["hbm_bytes_per_device"] == RUNS[name][4]
    compiled = plan["compiled"]
    assert compiled["argument_bytes"] + compiled["temp_bytes"] <= compiled["total_bytes"]
    assert compiled["total_bytes"] < RUNS[name][4]


def test_the_estimate_is_within_15_percent_of_the_compilers_memory(run):
    _, plan = run
    estimate, compiled = plan["bytes_per_device"]["total"], plan["compiled"]["total_bytes"]
    assert estimate == pytest.approx(compiled, rel=0.15)


def test_what_lies_on_a_chip_is_what_was_counted(run):
    _, plan = run
    sizes = plan["bytes_per_device"]
    resident = sum(sizes[name] for name in ("weights", "trainable", "optimizer"))
    assert resident == pytest.approx(plan["compiled"]["argument_bytes"], rel=0.02)


def test_no_collective_moves_more_than_a_layer_or_a_table_at_once(run):
    name, plan = run
    shapes = flatten(abstract_params(preset(RUNS[name][0]), Method()))
    layers = preset(RUNS[name][0]).num_layers
    stacked = [leaf for path, leaf in shapes.items() if path.startswith("blocks/")]
    layer = sum(leaf.size for leaf in stacked) // layers * 2
    table = max(leaf.size for path, leaf in shapes.items() if not path.startswith("blocks/")) * 2
    largest = plan["compiled"]["largest_collective"]
    assert 0 < largest["bytes"] <= max(layer, table)
    assert largest["bytes"] < sum(leaf.size for leaf in shapes.values()) * 2 / 5


def test_frozen_weights_have_no_gradient_to_sum(run):
    name, plan = run
    compiled = plan["compiled"]
    assert compiled["frozen_gradient_collectives"] == 0
    moved = sum(row["bytes"] for row in compiled["collectives"].values())
    # A gradient of every weight would be summed once more than the weights are gathered.
    passes = 3 if RUNS[name][1] == "lora" else 5
    assert moved < 1.3 * passes * 2 * plan["parameters"]["total"]


def test_operations_are_those_of_the_compiled_products(run):
    """All but attention's, which the kernel computes out of the compiler's sight."""
    name, plan = run
    config = preset(RUNS[name][0])
    pairs = TOKENS * (TOKENS + 1) // 2
    attention = 4 * 4 * config.num_heads * config.head_dim * pairs * config.num_layers
    a_chip = plan["flops_per_step"] / plan["devices"]["count"]
    assert plan["compiled"]["flops_per_device"] == pytest.approx(a_chip - attention, rel=0.02)


def test_the_step_runs_the_splash_kernel(run):
    assert run[1]["attention"].startswith("splash")
