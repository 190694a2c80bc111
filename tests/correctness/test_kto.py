"""KTO: C1, C2, C3, C10, C21, C33; its reference point is one number for the whole batch."""

from __future__ import annotations

import functools
import json
import math

import numpy as np
import pytest

import jaxtune
from jaxtune.data.mismatched import mismatched
from jaxtune.parallel.mesh import make_mesh
from jaxtune.recipes import kto
from jaxtune.recipes.build import build
from jaxtune.recipes.schema.resolve import resolve
from tests.correctness.pair_runs import pair_config
from tests.correctness.pairs import assert_same, config_of, measure, pair_batch, pair_examples
from tests.correctness.small import METHODS, small
from tests.correctness.test_preferences import PEFT, sum_by_hand

pytestmark = pytest.mark.slow

OBJECTIVE = {"name": "kto", "desirable_weight": 1.5, "undesirable_weight": 0.5}
EXAMPLES = pair_examples([(4, 5), (2, 9), (6, 2), (1, 7), (3, 3), (5, 8)], seed=2)
LABELS, WEIGHTS = [1, 0, 0, 1, 1, 0], [1.0, 0.5, 2.0, 1.0, 1.0, 3.0]
POINT = 0.7


def batch_of(rows, weights=WEIGHTS):
    return kto.with_point(pair_batch(METHODS["lora"], rows, weights, LABELS), POINT)


RAGGED = [[example] for example in EXAMPLES]


@functools.cache
def measure_of(devices: int = 1, count: int = 1):
    model = small("lora", mesh=make_mesh({"fsdp": devices}))
    return measure(model, config_of(PEFT, OBJECTIVE, "unpaired"), count)


def test_c10_the_loss_by_hand():
    total, right = 0.0, 0.0
    for (prompt, completion), label, weight in zip(EXAMPLES, LABELS, WEIGHTS, strict=True):
        ratio = sum_by_hand("policy", prompt, completion) - sum_by_hand("base", prompt, completion)
        gain = 0.1 * (ratio - POINT)
        scale, sign = (1.5, 1) if label else (0.5, -1)
        total += weight * scale * (1 - 1 / (1 + math.exp(-sign * gain)))
        right += weight * (sign * ratio > 0)
    loss, metrics, _ = measure_of()(batch_of(RAGGED))
    assert loss == pytest.approx(total / sum(WEIGHTS), rel=1e-5)
    assert metrics["kl"] == pytest.approx(POINT)
    assert metrics["accuracy"] == pytest.approx(right / sum(WEIGHTS))


def test_c1_c2_c11_micro_batches_devices_order_and_rows_do_not_matter():
    whole = measure_of()(batch_of(RAGGED))
    order = np.random.default_rng(1).permutation(8)
    assert_same(measure_of()({k: v[order] for k, v in batch_of(RAGGED).items()}), whole)
    assert_same(measure_of(devices=2, count=4)(batch_of(RAGGED)), whole)
    assert_same(measure_of()(batch_of([EXAMPLES[:2], EXAMPLES[2:3], EXAMPLES[3:]])), whole)


def test_c33_a_batch_without_completions_gives_no_gradient():
    loss, _, grads = measure_of()(batch_of([]))
    assert loss == 0.0
    assert all(np.array_equal(g, np.zeros_like(g)) for g in grads.values())


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tmp_path_factory.mktemp("kto")


def losses(config, workdir) -> list[list[float]]:
    rows = jaxtune.train(config, workdir).history
    names = ("loss", "kl", "eval/loss", "eval/kl", "eval/accuracy")
    return [[row[name] for name in names if name in row] for row in rows]


def test_the_reference_point_does_not_depend_on_micro_batches_or_the_size_of_evaluations(
    data, tmp_path
):
    """A value a micro-batch would be another loss (CORRECTNESS C1, C3)."""
    objective = {"name": "kto", "beta": 0.5}
    one = pair_config(data, PEFT, objective, total_steps=3)
    for part, name in (("train", "train"), ("eval", "held")):
        # Wanted completions alone become likelier behind any prompt, so that the mean is above 0.
        rows = map(json.loads, (data / f"{name}.jsonl").read_text().splitlines())
        kept = [{"prompt": r["prompt"], "completion": r["chosen"], "label": True} for r in rows]
        path = data / f"{name}_wanted.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in kept))
        one["data"][part] = [{"source": f"jsonl:{path}", "format": "unpaired"}]
    two = one | {"grad_accum": 2, "eval": {"batch_size": 3}}
    first, second = losses(one, tmp_path / "one"), losses(two, tmp_path / "two")
    assert first[0][0] == pytest.approx(0.5, rel=1e-5) and first[0][1] == pytest.approx(0, abs=1e-5)
    assert first[-1][1] > 0.01  # it moved, so that the comparison means something
    np.testing.assert_allclose(np.concatenate(first), np.concatenate(second), rtol=1e-4, atol=1e-6)


def test_a_pair_is_a_good_and_a_bad_completion_and_other_prompts_are_taken(data):
    plan = build(resolve(pair_config(data, objective={"name": "kto"})))
    (store,) = plan.data.stream.stores
    (other,) = plan.data.mismatched.stream.stores
    assert len(store) == len(other) == 32
    for i in range(len(store)):
        (ids, mask), (mixed, targets) = store.example(i), other.example(i)
        prompt = ids[: int(np.argmax(mask > 0))]
        assert np.array_equal(mixed[: len(prompt)], prompt) and not targets[: len(prompt)].any()
        j = next(k % 32 for k in range(i + 1, i + 4) if not same_prompt(store, i, k % 32))
        taken = store.example(j)[0][int(np.argmax(store.example(j)[1] > 0)) :]
        assert np.array_equal(mixed[len(prompt) :], taken[: len(mixed) - len(prompt)])
    short = mismatched(store, 7)
    assert max(short.lengths) == 7


def same_prompt(store, i: int, j: int) -> bool:
    one, two = (store.example(k)[0][: int(np.argmax(store.example(k)[1] > 0))] for k in (i, j))
    return np.array_equal(one, two)


@pytest.mark.parametrize("peft", ["full"])
def test_c21_with_a_column_it_begins_at_its_reference_too(peft, data, tmp_path):
    config = pair_config(data, peft, objective={"name": "kto"}, total_steps=1)
    rows = jaxtune.train(config, tmp_path / "run").history
    assert rows[0]["drift"] < 1e-5 and rows[0]["kl"] < 1e-4
    assert rows[0]["loss"] == pytest.approx(0.5, rel=1e-4)
    json.dumps(rows)
