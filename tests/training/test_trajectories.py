"""Ten training steps give the losses and gradient norms of PyTorch + PEFT, for every method."""

import json
from pathlib import Path

import ml_collections
import numpy as np
import pytest

import jaxtune
from tests.goldens import tiny

GOLDEN = json.loads((Path(tiny.__file__).parent / "trajectories.json").read_text())
RECIPE, METHODS = GOLDEN["recipe"], tuple(GOLDEN["runs"])

_LORA = {
    "method": "lora",
    "rank": tiny.RANK,
    "alpha": float(tiny.ALPHA),
    "dropout": 0.0,
    "targets": list(tiny.LINEAR),
}
PEFT = {
    "full": {"method": "full"},
    "lora": _LORA,
    "lora_qv": _LORA | {"targets": ["q_proj", "v_proj"]},
    "rslora": _LORA | {"variant": "rslora"},
    "dora": _LORA | {"variant": "dora"},
    "prompt": {"method": "prompt", "num_tokens": tiny.VIRTUAL},
    "prefix": {"method": "prefix", "num_tokens": tiny.VIRTUAL},
    "ia3": {"method": "ia3", "targets": ["k_proj", "v_proj", "down_proj"]},
}


def config_of(method: str, directory: Path) -> ml_collections.ConfigDict:
    """The config that repeats the recipe of trajectories.json, its files in `directory`."""
    model, adapter = tiny.write_world(directory, method)
    examples = [example for batch in tiny.batches() for example in batch]
    data = directory / "train.jsonl"
    data.write_text("".join(json.dumps(example) + "\n" for example in examples))
    peft = PEFT[method] | ({"init_from": str(adapter)} if adapter else {})
    # A row of prompt tuning holds the virtual tokens too.
    virtual = tiny.VIRTUAL if method == "prompt" else 0
    return ml_collections.ConfigDict(
        {
            "model": {"path": str(model), "dtype": "float32"},
            "peft": peft,
            "objective": {"name": "sft"},
            "data": {
                "train": [{"source": f"jsonl:{data}", "format": "tokens"}],
                "seq_len": RECIPE["max_length"] + virtual,
                "shuffle": False,
            },
            "batch_size": RECIPE["batch_size"],
            "total_steps": RECIPE["steps"],
            "optim": {
                "name": "adamw",
                "lr": RECIPE["lr"][method],
                "schedule": "constant",
                "b1": RECIPE["b1"],
                "b2": RECIPE["b2"],
                "eps": RECIPE["eps"],
                "weight_decay": RECIPE["weight_decay"],
                "clip_norm": RECIPE["clip_norm"],
            },
            "mesh": {"data": 1, "fsdp": 1},
            "log": {"every_steps": 1, "tensorboard": False},
        }
    )


@pytest.fixture(scope="module")
def trajectory(tmp_path_factory):
    """method → {loss, grad_norm}, lists of ten, of a jaxtune run; each is run once."""
    known = {}

    def run(method: str) -> dict[str, list[float]]:
        if method not in known:
            directory = tmp_path_factory.mktemp(method)
            result = jaxtune.train(config_of(method, directory), str(directory / "run"))
            rows = [row for row in result.history if "loss" in row]
            assert [row["step"] for row in rows] == list(range(1, RECIPE["steps"] + 1))
            known[method] = {key: [row[key] for row in rows] for key in ("loss", "grad_norm")}
        return known[method]

    return run


@pytest.mark.parametrize("method", METHODS)
def test_golden_belongs_to_these_inputs(method, tmp_path):
    assert tiny.world_fingerprint(tmp_path, method) == GOLDEN["runs"][method]["inputs"]


@pytest.mark.smoke
@pytest.mark.parametrize("method", METHODS)
def test_ten_steps_equal_the_golden_trajectory(method, trajectory):
    run = trajectory(method)
    for key in ("loss", "grad_norm"):
        np.testing.assert_allclose(run[key], GOLDEN["runs"][method][key], rtol=1e-4, err_msg=key)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_ten_steps_equal_pytorch_and_peft_live(method, trajectory, tmp_path):
    for module in ("torch", "transformers", "peft"):
        pytest.importorskip(module)
    from tests.goldens import trajectories

    live, run = trajectories.run(method, tmp_path), trajectory(method)
    for key in ("loss", "grad_norm"):
        np.testing.assert_allclose(run[key], live[key], rtol=1e-4, err_msg=key)
        np.testing.assert_allclose(GOLDEN["runs"][method][key], live[key], rtol=1e-5, err_msg=key)
