"""What a run retains beyond the loss: KL from its start, and accuracy on tasks."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxtune
from jaxtune.core.errors import RequestError
from jaxtune.evaluate.bootstrap import mean_of, paired
from jaxtune.recipes.build import build
from jaxtune.recipes.runs import open_run
from jaxtune.recipes.schema.resolve import resolve
from jaxtune.recipes.workdir import within

STORY = "One day a dog ran to the big red house. The cat was sad. Then they had a lot of fun."
# The base is likely to write these; what the run is tuned on has the other words.
TASK = [("Once upon", " a time"), ("The cat was very", " sad"), ("They had a lot of", " fun")]


@pytest.fixture(scope="module")
def world(shared, tmp_path_factory):
    """(directory of the data, the base)."""
    directory = tmp_path_factory.mktemp("world")
    task = [{"prompt": p, "completion": c} for p, c in TASK]
    wrong = [{"prompt": p, "completion": " zzz qqq"} for p, _ in TASK] * 2
    for name, rows in (("task", task), ("train", wrong), ("old", [{"text": STORY}])):
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return directory, shared / "models" / "stories260k"


def config_of(world, peft, **retention):
    directory, model = world
    entry = {"source": f"jsonl:{directory / 'train.jsonl'}", "format": "completion"}
    old = {"source": f"jsonl:{directory / 'old.jsonl'}", "format": "text", "name": "old"}
    task = {"source": f"jsonl:{directory / 'task.jsonl'}", "format": "completion", "name": "task"}
    return {
        "model": {"path": str(model), "dtype": "float32"},
        "peft": peft,
        "data": {"train": [entry], "seq_len": 64},
        "batch_size": 2,
        "total_steps": 2,
        "optim": {"name": "adamw", "lr": 2e-2},
        "eval": {"every_steps": 1},
        "checkpoint": {"every_steps": 1, "async_save": False},
        "retention": {
            "data": [old],
            "tasks": [task | {"labels": ["a time", "sad", "fun", "zzz qqq"]}],
            "measure_kl": True,
            **retention,
        },
        "mesh": {"data": 1, "fsdp": 1},
        "log": {"every_steps": 1, "tensorboard": False},
    }


def rows_of(workdir: Path) -> dict[int, dict]:
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row for row in rows if "retention/nll" in row}


def kl_by_whole_logits(base, model, top: int | None) -> float:
    """KL(base‖model) at the targets of the story; of `top` tokens and the rest together."""
    ids = np.array([[*base.tokenizer.encode(STORY), base.tokenizer.eos_id]])
    p, q = (jax.nn.softmax(m.logits(ids)[0, :-1], axis=-1) for m in (base, model))
    if top is not None:
        order = jnp.argsort(-p, axis=-1)[:, :top]
        p, q = (
            jnp.concatenate([s, 1 - s.sum(axis=-1, keepdims=True)], axis=-1)
            for s in (jnp.take_along_axis(x, order, axis=-1) for x in (p, q))
        )
    return float(jnp.mean(jnp.sum(p * jnp.log(p / q), axis=-1)))


@pytest.fixture(scope="module")
def lora(world, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("lora") / "run"
    jaxtune.train(config_of(world, {"method": "lora", "rank": 2}), workdir)
    return workdir


@pytest.mark.slow
def test_the_kl_is_that_of_whole_distributions_where_the_base_is_there(world, lora):
    rows = rows_of(lora)
    assert rows[0]["retention/kl"] == pytest.approx(0, abs=1e-6)
    tuned = jaxtune.load(lora, dtype="float32")
    expected = kl_by_whole_logits(tuned.use(None), tuned, None)
    assert rows[2]["retention/kl"] == pytest.approx(expected, rel=1e-3)
    assert "retention/kl_rise" not in rows[2]


@pytest.mark.slow
def test_elsewhere_it_is_that_of_the_likeliest_tokens_at_the_start(world, tmp_path):
    """Stopped half-way and continued: the start is then loaded again."""
    partly = {"method": "full", "train": ["blocks/mlp/.*"]}
    config = config_of(world, partly, tasks=[])
    jaxtune.train(config | {"total_steps": 1}, tmp_path / "run")
    jaxtune.train(config, tmp_path / "run", allow_change=True)
    rows = rows_of(tmp_path / "run")
    assert rows[0]["retention/kl"] == pytest.approx(0, abs=1e-6)
    models = [jaxtune.load(path, dtype="float32") for path in (world[1], tmp_path / "run")]
    bound, whole = (kl_by_whole_logits(*models, top) for top in (64, None))
    assert rows[2]["retention/kl"] == pytest.approx(bound, rel=1e-3)
    assert 0 < bound <= whole


@pytest.mark.slow
def test_the_accuracy_on_tasks_falls_by_what_is_told(world, lora):
    """Oracle: the likeliest label of each example, before and after, and their bootstrap."""
    rows, tuned = rows_of(lora), jaxtune.load(lora, dtype="float32")
    hits = []
    for model in (tuned.use(None), tuned):
        right = []
        for prompt, answer in TASK:
            start, found = len(model.tokenizer.encode(prompt)), {}
            for label in (" a time", " sad", " fun", " zzz qqq"):
                ids = [*model.tokenizer.encode(prompt + label), model.tokenizer.eos_id]
                found[label] = float(np.asarray(model.logprobs([ids]))[0, start - 1 :].sum())
            right.append(float(max(found, key=found.get) == answer))
        hits.append(np.array(right))
    before, after = hits
    assert rows[0]["retention/accuracy"] == before.mean() > 0
    assert rows[2]["retention/accuracy"] == after.mean()
    _, low, high = paired(mean_of(before), mean_of(after))
    told = [rows[2][f"retention/accuracy_drop{end}"] for end in ("", "/low", "/high")]
    assert told == pytest.approx([before.mean() - after.mean(), low, high])
    kept = json.loads((lora / "retention.json").read_text())
    assert kept["hits"] == {"task": before.astype(int).tolist()}


@pytest.mark.slow
def test_a_bound_on_the_kl_rolls_the_run_back(world, lora, tmp_path):
    rows = rows_of(lora)
    first, second = rows[1]["retention/kl"], rows[2]["retention/kl"]
    assert first < second
    bound = {"max_kl": (first + second) / 2, "on_rise": "rollback"}
    config = config_of(world, {"method": "lora", "rank": 2}, **bound)
    summary = jaxtune.train(config, tmp_path / "run").summary
    assert (summary["stop_reason"], summary["step"]) == ("retention", 2)
    assert "retention/kl is" in summary["detail"] and "retention.max_kl" in summary["detail"]
    assert open_run(tmp_path / "run").step == 1


def test_a_drop_is_bounded(world):
    gate = build(resolve(config_of(world, {"method": "ia3"}, max_drop=0.25))).retention.gate
    assert gate({"retention/accuracy_drop": 0.25, "retention/kl": 9.0}) is None
    told = gate({"retention/accuracy_drop": 0.5})
    assert told == "retention/accuracy_drop is 0.5, more than retention.max_drop = 0.25"
    bounds = {"retention/kl": 1.0, "retention/accuracy_drop": 0.1}
    assert within({"retention/kl": 0.5, "retention/accuracy_drop": -0.1}, bounds)
    assert not within({"retention/kl": 0.5}, bounds)


@pytest.mark.parametrize(
    ("retention", "told"),
    [
        ({"max_kl": 1.0, "measure_kl": False}, "retention.max_kl: needs retention.measure_kl"),
        ({"max_drop": 0.1, "tasks": []}, "retention.max_drop: needs retention.tasks, which is"),
        ({"max_drop": 1.5}, "retention.max_drop: expected a number > 0 and < 1"),
        ({"data": []}, "retention.measure_kl: needs retention.data"),
        (
            {"tasks": [{"source": "jsonl:x", "format": "text"}]},
            r"retention.tasks\[0\].format: 'text' has no prompt with an answer",
        ),
    ],
)
def test_what_contradicts_is_refused(world, retention, told):
    with pytest.raises(RequestError, match=told):
        resolve(config_of(world, {"method": "ia3"}, **retention))
