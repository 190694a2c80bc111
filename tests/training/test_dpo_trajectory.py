"""Ten DPO steps of a LoRA give the losses, rewards and gradient norms of TRL's DPOTrainer."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxtune.optim.schedules import make_schedule
from jaxtune.optim.transform import make_transform
from jaxtune.parallel.batches import global_batch
from jaxtune.parallel.mesh import make_mesh
from jaxtune.peft.lora import Lora
from jaxtune.recipes import reference
from jaxtune.recipes.assemble import load_parts, plan_parts
from jaxtune.recipes.build import optim_spec
from jaxtune.recipes.objectives import OBJECTIVES
from jaxtune.recipes.rows import Rows
from jaxtune.recipes.runs import open_base
from jaxtune.recipes.schema.resolve import resolve
from jaxtune.training.compile import fresh_state, jit_step, make_layout
from jaxtune.training.step import make_train_step
from tests.correctness.pairs import pair_batch
from tests.goldens import dpo_trajectory, tiny

pytestmark = pytest.mark.slow

GOLDEN = json.loads(Path(dpo_trajectory.FILE).read_text())
RECIPE, RUN = GOLDEN["recipe"], GOLDEN["run"]
WIDTH = 40
NAMES = {
    "loss": "loss",
    "grad_norm": "grad_norm",
    "rewards/chosen": "rewards/chosen",
    "rewards/rejected": "rewards/rejected",
    "margin": "rewards/margins",
    "accuracy": "rewards/accuracies",
}


@pytest.fixture(scope="module")
def steps(tmp_path_factory) -> list[dict[str, float]]:
    """The metrics of each step."""
    directory = tmp_path_factory.mktemp("trajectory")
    path, adapter = dpo_trajectory.write_world(directory)
    peft = {"method": "lora", "rank": tiny.RANK, "alpha": float(tiny.ALPHA)}
    config = resolve(
        {
            "model": {"path": str(path), "dtype": "float32"},
            "peft": peft | {"targets": list(tiny.LINEAR)},
            "objective": {"name": "dpo", "beta": RECIPE["beta"]},
            "data": {
                "train": [{"source": "jsonl:none", "format": "preference"}],
                "seq_len": WIDTH,
            },
            "batch_size": RECIPE["batch_size"],
            "total_steps": RECIPE["steps"],
            "optim": {
                name: RECIPE[name]
                for name in ("lr", "b1", "b2", "eps", "weight_decay", "clip_norm")
            },
        }
    )
    mesh, base = make_mesh({}, jax.devices()[:1]), open_base(config.model, 0)
    method = Lora(rank=tiny.RANK, alpha=float(tiny.ALPHA), targets=tuple(tiny.LINEAR))
    parts = plan_parts(base.config, method, mesh)
    assert reference.adapters_off(parts, None)
    trainable, frozen = parts.split(load_parts(base, parts, mesh, 0, str(adapter)))
    trained, held = parts.split(parts.shapes)
    schedule = make_schedule("constant", RECIPE["lr"], RECIPE["steps"])
    tx = make_transform(optim_spec(config.optim), parts.labels, trained, schedule)
    layout = make_layout(trained, held, parts.shardings, tx, mesh)
    loss = OBJECTIVES["dpo"].trained(config, parts, Rows(1))
    step = jit_step(make_train_step(loss, tx, schedule, 1), layout)
    found = []
    with jax.set_mesh(mesh):
        state = fresh_state(trainable, tx, 0, layout)
        for pairs in dpo_trajectory.batches():
            rows = [
                [tuple(np.array(pair[side]) for side in ("prompt", "chosen", "rejected"))]
                for pair in pairs
            ]
            batch = pair_batch(method, rows, width=WIDTH, count=len(rows))
            state, report = step(state, frozen, global_batch(batch, mesh))
            found.append({name: float(value) for name, value in report.items()})
    return found


def test_it_begins_at_its_reference(steps):
    assert steps[0]["loss"] == pytest.approx(np.log(2), abs=1e-6)
    assert abs(steps[0]["margin"]) < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_ten_steps_are_trls(name, steps):
    ours = [row[name] for row in steps]
    np.testing.assert_allclose(ours, RUN[NAMES[name]], rtol=1e-4, atol=1e-4)
