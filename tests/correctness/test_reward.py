"""The rows of the catalogue for reward models: C1, C2, C3, C10, C33, for pairs, lists and steps."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune.core.tree import flatten, map_paths
from jaxtune.evaluate.loss import loss_sums
from jaxtune.models import decoder
from jaxtune.optim.schedules import make_schedule
from jaxtune.optim.transform import OptimSpec, make_transform
from jaxtune.parallel.batches import global_batch
from jaxtune.parallel.mesh import make_mesh
from jaxtune.recipes.heads import Heads, headed
from jaxtune.recipes.reward import named, of_batch, scored_loss
from jaxtune.training.compile import fresh_state, jit_step, make_layout
from jaxtune.training.step import BAD_LEAF, make_train_step, summed_gradients
from tests.correctness.small import CONFIG, assert_same_gradients, plain, small

pytestmark = pytest.mark.slow

REWARD = headed(CONFIG, Heads(lm=False, score=True))
CENTERING = 0.1
ROWS, WIDTH = 8, 48
FORMATS = ("preference", "ranked", "stepwise")
INTS = ("input_ids", "segment_ids", "positions", "completions", "groups")
# Of each row: how long the prompt is, and each of its completions.
PAIRS = [(4, (3, 9)), (1, (2, 1)), (7, (11, 12)), (2, (5, 5)), (9, (1, 6)), (3, (4, 8))]
LISTS = [(4, (3, 9, 2)), (1, (2, 1)), (2, (5, 5, 1, 3)), (3, (4, 8))]


def batch_of(format: str, cases: Any = None, width: int = WIDTH, seed: int = 0) -> dict[str, Any]:
    """A batch [ROWS, width], a case a row and the rest padding; the ids do not depend on width."""
    cases = cases if cases is not None else LISTS if format == "ranked" else PAIRS
    keys = (*INTS, "loss_mask", "example_weight", "margin", "label")
    batch = {key: np.zeros((ROWS, width), np.int32 if key in INTS else np.float32) for key in keys}
    for r, (lead, sizes) in enumerate(cases):
        rng = np.random.default_rng([seed, r])
        prompt, margin = rng.integers(1, 97, lead), rng.uniform(0, 1)
        weight = (1.5, 0.75, 3.0)[r % 3]  # of exact sums, also over 3 and 6 pairs
        if format == "stepwise":
            put_steps(batch, r, rng, prompt, sizes, weight)
            continue
        at = 0
        for c, size in enumerate(sizes, 1):
            ids = [*prompt, *rng.integers(1, 97, size)]
            here, done = slice(at, at + len(ids)), slice(at + lead, at + len(ids))
            batch["input_ids"][r, here], batch["segment_ids"][r, here] = ids, c
            batch["positions"][r, here] = range(len(ids))
            for key, value in {
                "loss_mask": 1, "completions": c, "groups": 1, "example_weight": weight,
                "margin": margin,
            }.items():  # fmt: skip
                batch[key][r, done] = value
            at += len(ids)
    unused = {"preference": ("groups", "label"), "ranked": ("label",)}
    for key in unused.get(format, ("groups", "margin")):
        del batch[key]
    return batch


def put_steps(batch, r, rng, prompt, sizes, weight):
    at = len(prompt)
    total = at + sum(sizes)
    batch["input_ids"][r, :total] = [*prompt, *rng.integers(1, 97, sum(sizes))]
    batch["segment_ids"][r, :total], batch["positions"][r, :total] = 1, range(total)
    for c, size in enumerate(sizes, 1):
        at += size
        batch["completions"][r, at - 1], batch["loss_mask"][r, at - 1] = c, 1
        batch["example_weight"][r, at - 1] = weight
        batch["label"][r, at - 1] = c % 2


def loss_of(model, calibrated: bool = False):
    of_scores = functools.partial(of_batch, centering=CENTERING, calibrated=calibrated)
    return scored_loss(model.parts.config, model.method, of_scores)


@functools.cache
def compiled(method, mesh, count: int):
    loss = loss_of(small(method, REWARD, mesh))
    key = jax.random.key(0)
    return jax.jit(lambda t, f, batch: plain(summed_gradients(loss, t, f, batch, key, count)))


def gradients(model, batch, count: int = 1):
    """(loss sum, weight, {path: gradient}) over `count` micro-batches, undivided."""
    trainable, frozen = model.parts.split(model.params)
    with jax.set_mesh(model.mesh):
        placed = global_batch(batch, model.mesh)
        run = compiled(model.method, model.mesh, count)
        loss, _, grads = run(trainable, frozen, placed)
    flat = {p: np.asarray(g) for p, g in flatten(grads).items() if g is not None}
    return float(loss.sum), float(loss.weight), flat


@functools.cache
def scores_of(method):
    def run(params, batch):
        states = decoder.hidden_states(REWARD, method, params, batch).states
        return decoder.scores(REWARD, method, params, states)

    return jax.jit(run)


def oracle(model, format: str, batch) -> tuple[float, float]:
    """(Σ weight · loss, Σ weight), each completion alone in its row, the loss in float64."""
    total = weight = 0.0
    log_sigmoid = lambda x: -math.log1p(math.exp(-x)) if x > -30 else x  # noqa: E731
    for r in range(ROWS):
        scores = {}  # of completion → at its last token
        for s in range(1, batch["segment_ids"][r].max() + 1):
            at = np.flatnonzero(batch["segment_ids"][r] == s)
            one = {k: np.zeros((1, WIDTH), np.int32) for k in INTS[:3]}
            for key, array in one.items():
                array[0, : len(at)] = 1 if key == "segment_ids" else batch[key][r, at]
            found = np.asarray(scores_of(model.method)(model.params, one)[0], np.float64)
            for place, score in zip(at, found[: len(at)], strict=True):
                if batch["completions"][r, place]:
                    scores[int(batch["completions"][r, place])] = (score, place)
        if not scores:
            continue
        order = [scores[c] for c in sorted(scores)]
        w = float(batch["example_weight"][r, order[0][1]])
        if format == "preference":
            (chosen, place), (rejected, _) = order
            loss = -log_sigmoid(chosen - rejected - float(batch["margin"][r, place]))
            losses = [loss + CENTERING * (chosen + rejected) ** 2]
            weight += w
        elif format == "ranked":
            number = len(order)
            margin = float(batch["margin"][r, order[0][1]])
            losses = [
                -log_sigmoid(order[i][0] - order[j][0] - margin)
                for i in range(number)
                for j in range(i + 1, number)
            ]
            losses = [loss / len(losses) for loss in losses]
            weight += w
        else:
            losses = [
                -log_sigmoid(score if batch["label"][r, place] else -score)
                for score, place in order
            ]
            weight += w * len(losses)
        total += w * sum(losses)
    return total, weight


@pytest.mark.parametrize("format", FORMATS)
def test_the_loss_is_that_of_each_completion_alone(format):
    model, batch = small("lora", REWARD), batch_of(format)
    total, weight, grads = gradients(model, batch)
    np.testing.assert_allclose((total, weight), oracle(model, format, batch), rtol=1e-5)
    assert np.abs(grads["score/kernel"]).max() > 0
    assert set(grads) == {*(path for path in grads if "/lora/" in path), "score/kernel"}


@pytest.mark.parametrize("format", FORMATS)
def test_c1_micro_batches_equal_one_batch(format):
    model, batch = small("lora", REWARD), batch_of(format)
    whole = gradients(model, batch)
    # micro-batches of one row: some of them hold no pair
    assert_same_gradients(gradients(model, batch, 8), whole)


def test_c2_devices_and_order_of_rows_do_not_matter():
    one, batch = small("lora", REWARD), batch_of("preference")
    whole = gradients(one, batch)
    order = np.random.default_rng(1).permutation(8)
    assert_same_gradients(gradients(one, {k: v[order] for k, v in batch.items()}), whole)
    for axes in ({"fsdp": 2}, {"fsdp": 8}, {"tensor": 2, "sequence": 2, "data": 2}):
        spread = small("lora", REWARD, mesh=make_mesh(axes))
        tolerance = 1e-5 if "tensor" in axes else 1e-6
        assert_same_gradients(gradients(spread, batch), whole, tolerance)


def test_c3_evaluation_does_not_depend_on_batch_size_or_padding():
    model = small("lora", REWARD)
    trainable, frozen = model.parts.split(model.params)
    loss = loss_of(model, calibrated=True)
    step = jax.jit(lambda t, f, b: loss(t, f, b, None))

    def measured(size: int, width: int):
        whole = batch_of("preference", width=width)
        rows = [{k: v[i : i + size] for k, v in whole.items()} for i in range(0, ROWS, size)]
        return loss_sums(step, trainable, frozen, rows, model.mesh, likelihood=False).means()

    first, *others = [measured(*shape) for shape in ((8, WIDTH), (1, WIDTH), (4, 64))]
    assert set(first) == {
        "loss", "accuracy", "margin", "chosen", "rejected", "mean", "calibration_error", "tokens",
    }  # fmt: skip
    for result in others:
        for key, value in first.items():
            np.testing.assert_allclose(result[key], value, rtol=1e-5, atol=1e-6, err_msg=key)


def by_hand():
    """A model whose layers add nothing and that scores token i by a table."""
    table = np.array([0.5, -1.0, 2.0, 0.25, -0.75])
    config = dataclasses.replace(REWARD, vocab_size=5, norm_eps=0.0)
    model = small("full", config)

    def leaf_of(path, leaf):
        if path == "embed/embedding":
            return jnp.eye(5, 32)
        if path == "score/kernel":
            return jnp.zeros((32, 1)).at[:5, 0].set(table / np.sqrt(32))  # norm scales by √D
        return jnp.ones_like(leaf) if path.endswith("scale") else jnp.zeros_like(leaf)

    return dataclasses.replace(model, params=map_paths(leaf_of, model.params)), config


def test_c10_the_score_is_read_at_the_last_token_by_hand():
    """Prompt 0 1, chosen 3 2, rejected 4: scores 2 and -0.75, margin 0.5, weight 2."""
    model, config = by_hand()
    batch = {
        "input_ids": [[0, 1, 3, 2, 0, 1, 4, 0]],
        "segment_ids": [[1, 1, 1, 1, 2, 2, 2, 0]],
        "positions": [[0, 1, 2, 3, 0, 1, 2, 0]],
        "completions": [[0, 0, 1, 1, 0, 0, 2, 0]],
    }
    batch = {key: jnp.array(value, jnp.int32) for key, value in batch.items()}
    on = (batch["completions"] > 0).astype(jnp.float32)
    batch |= {"loss_mask": on, "margin": 0.5 * on, "example_weight": 2 * on}
    loss = scored_loss(config, model.method, functools.partial(of_batch, calibrated=True))
    frozen = map_paths(lambda *_: None, model.params)
    found, metrics = jax.jit(lambda p, b: loss(p, frozen, b, None))(model.params, batch)
    assert math.isclose(found.sum, 2 * math.log1p(math.exp(-(2.75 - 0.5))), rel_tol=1e-5)
    assert found.weight == 2
    means = {name: float(value.mean()) for name, value in metrics.items()}
    claimed = 1 / (1 + math.exp(-2.75))
    wanted = {"accuracy": 1, "margin": 2.75, "chosen": 2, "rejected": -0.75, "mean": 0.625}
    wanted |= {"calibration/bin_8": 1 - claimed}  # 0.94 claimed is in the ninth tenth of [½, 1]
    for name, value in wanted.items():
        assert math.isclose(means[name], value, rel_tol=1e-5), name


def test_c33_a_batch_without_pairs_gives_no_gradient():
    model = small("lora", REWARD)
    trained, held = model.parts.split(model.parts.shapes)
    schedule = make_schedule("constant", 1e-2, 10)
    spec = OptimSpec(weight_decay=0.0)
    tx = make_transform(spec, model.parts.labels, trained, schedule, ())
    layout = make_layout(trained, held, model.parts.shardings, tx, model.mesh)
    step = jit_step(make_train_step(loss_of(model), tx, schedule, 1), layout)
    trainable, frozen = model.parts.split(model.params)
    before = {p: np.asarray(x) for p, x in flatten(trainable).items() if x is not None}
    with jax.set_mesh(model.mesh):
        state = fresh_state(jax.tree.map(jnp.copy, trainable), tx, 0, layout)
        batch = global_batch(batch_of("preference", cases=[]), model.mesh)
        state, report = step(state, frozen, batch)
    assert report["trained_tokens"] == report["grad_norm"] == report["loss"] == 0
    assert report[BAD_LEAF] == -1
    for path, leaf in before.items():
        np.testing.assert_array_equal(flatten(state.trainable)[path], leaf)


def test_metrics_have_the_names_by_which_a_best_checkpoint_is_kept():
    assert list(named({"rewards/accuracy": 0})) == ["accuracy"]
