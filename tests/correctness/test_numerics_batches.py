"""How examples are put together must not matter: C1, C2, C3, C10, C11, C33."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune.core.tree import flatten, map_paths
from jaxtune.data.batches import eval_batches
from jaxtune.data.token_store import Counts, TokenStore
from jaxtune.evaluate.loss import loss_sums
from jaxtune.models.config import LayerKind
from jaxtune.models.decoder import hidden_states, logits
from jaxtune.optim.transform import OptimSpec
from jaxtune.parallel.mesh import make_mesh
from jaxtune.training.step import BAD_LEAF
from tests.correctness.small import (
    CONFIG,
    DISTINCT,
    METHODS,
    assert_same_gradients,
    batch_of,
    examples,
    small,
    training,
)

pytestmark = pytest.mark.slow

# Ragged rows; `batch_of` adds two that are empty, as those of a last, partial batch.
RAGGED = [[e] for e in examples([5, 19, 2, 11, 7, 41])]


@pytest.mark.parametrize("name", DISTINCT)
def test_c1_micro_batches_equal_one_batch(name):
    """The mean of micro-batches' means is another loss: https://github.com/huggingface/trl/issues/2175."""
    model = small(name)
    batch = batch_of(model.method, RAGGED)
    whole = model.gradients(batch)
    assert whole[1] == batch["loss_mask"].sum() > 0
    # 8 micro-batches of one row: two of them hold no target
    for count in (2, 4, 8) if name == "full" else (8,):
        assert_same_gradients(model.gradients(batch, count), whole)


@pytest.mark.parametrize("name", DISTINCT)
def test_c2_devices_and_order_of_rows_do_not_matter(name):
    """A mean a device, then their mean: https://github.com/huggingface/trl/issues/6380."""
    one = small(name)
    batch = batch_of(one.method, RAGGED)
    whole = one.gradients(batch)
    order = np.random.default_rng(1).permutation(8)
    assert_same_gradients(one.gradients({k: v[order] for k, v in batch.items()}), whole)
    for count in (2, 8) if name == "full" else (8,):
        spread = small(name, mesh=make_mesh({"fsdp": count}))
        assert_same_gradients(spread.gradients(batch), whole)


@pytest.mark.parametrize("name", ["full", "prompt"])
def test_c3_evaluation_does_not_depend_on_batch_size_or_padding(name):
    """CORRECTNESS C3: the mean is over tokens, whatever rows they came in."""
    model = small(name)
    rows = examples([5, 19, 2, 11, 7])
    ends = np.cumsum([0, *(len(ids) for ids, _ in rows)])
    ids, mask = (np.concatenate(column) for column in zip(*rows, strict=True))
    store = TokenStore(ids, mask, ends, np.arange(len(rows)), Counts(), None)
    trainable, frozen = model.parts.split(model.params)
    step = jax.jit(lambda t, f, b: model.loss(t, f, b, None))
    results = [
        loss_sums(
            step,
            trainable,
            frozen,
            eval_batches(store, size, width, model.method.num_virtual),
            model.mesh,
        ).means()
        for size, width in ((1, 24), (3, 24), (8, 40))
    ]
    for result in results[1:]:
        assert result["tokens"] == results[0]["tokens"] == sum(m.sum() for _, m in rows)
        for key in ("loss", "accuracy", "perplexity"):
            np.testing.assert_allclose(result[key], results[0][key], rtol=1e-6, err_msg=key)


def test_c10_loss_of_five_tokens_by_hand():
    """Labels off by one: https://github.com/OpenRLHF/OpenRLHF/issues/973.

    A model whose logits at token i are the logarithms of row i of a table: its layers add nothing,
    each embedding is a unit vector, and the head holds the table.
    """
    table = np.full((5, 5), 1 / 8)
    table[0, 3] = table[3, 1] = table[2, 0] = 1 / 2
    table[1] = [1 / 8, 1 / 8, 3 / 8, 1 / 8, 1 / 4]
    table[4] = [1 / 8, 1 / 8, 1 / 4, 3 / 8, 1 / 8]
    assert np.allclose(table.sum(-1), 1)
    config = dataclasses.replace(CONFIG, vocab_size=5, norm_eps=0.0)
    model = small("full", config)

    def by_hand(path, leaf):
        if path == "embed/embedding":
            return jnp.eye(5, 32)
        if path == "lm_head/kernel":
            return jnp.zeros((32, 5)).at[:5].set(jnp.log(table) / np.sqrt(32))  # norm scales by √D
        return jnp.ones_like(leaf) if path.endswith("scale") else jnp.zeros_like(leaf)

    model = dataclasses.replace(model, params=map_paths(by_hand, model.params))
    ids = np.array([0, 3, 1, 4, 2], np.int32)
    every = (ids, np.array([0, 1, 1, 1, 1], np.float32))  # 1/2 · 1/2 · 1/4 · 1/4
    some = (ids, np.array([0, 1, 0, 0, 1], np.float32))  # 1/2 · 1/4
    first = (ids, np.array([0, 0, 1, 0, 0], np.float32))  # 1/2
    for example, halvings, weight in ((every, 6, 4), (some, 3, 2), (first, 1, 1)):
        total, count, _ = model.gradients(batch_of(model.method, [[example]]))
        np.testing.assert_allclose(total, halvings * np.log(2), rtol=1e-6)
        assert count == weight
    # a weight is a factor, and is divided by once
    heavy = (ids, np.array([0, 0.5, 0, 0, 0.25], np.float32))
    total, count, _ = model.gradients(batch_of(model.method, [[heavy]]))
    np.testing.assert_allclose(total, (0.5 + 0.25 * 2) * np.log(2), rtol=1e-6)
    assert count == 0.75


WINDOWED = dataclasses.replace(CONFIG, kinds=(LayerKind(), LayerKind(8)), pattern=(0, 1))


@pytest.mark.parametrize(
    ("name", "config"),
    [*((name, CONFIG) for name in METHODS), ("full", WINDOWED), ("prompt", WINDOWED)],
    ids=lambda value: value if isinstance(value, str) else f"kinds={len(value.kinds)}",
)
def test_c11_packed_examples_equal_separate_ones(name, config):
    """Packed examples see each other: https://github.com/huggingface/trl/issues/1230."""
    model = small(name, config)
    a, b, c = examples([5, 20, 11])
    apart = model.gradients(batch_of(model.method, [[a], [b], [c]]))
    packed = model.gradients(batch_of(model.method, [[a, b, c]]))
    assert_same_gradients(packed, apart)


@pytest.mark.parametrize("name", ["full", "prompt", "prefix"])
def test_c11_a_neighbour_changes_no_bit(name):
    """https://github.com/hiyouga/LLaMA-Factory/issues/2289."""
    config = WINDOWED  # a layer that sees everything, and one that sees 8 positions
    model = small(name, config)
    method, lead = model.method, model.method.num_virtual

    @jax.jit
    def run(params, batch):
        hidden = hidden_states(config, method, params, batch)[0]
        return logits(config, method, params, hidden)

    a, b = examples([9, 14])
    (other,) = examples([9], seed=7)
    (later,) = examples([14], seed=8)
    plain = np.asarray(run(model.params, batch_of(method, [[a, b]])))
    first = np.asarray(run(model.params, batch_of(method, [[other, b]])))
    second = np.asarray(run(model.params, batch_of(method, [[a, later]])))
    cut, end = 9 + lead, 9 + 14 + 2 * lead
    assert np.array_equal(plain[0, cut:end], first[0, cut:end])
    assert not np.array_equal(plain[0, lead:cut], first[0, lead:cut])
    assert np.array_equal(plain[0, :cut], second[0, :cut])
    assert not np.array_equal(plain[0, cut + lead : end], second[0, cut + lead : end])


@pytest.mark.parametrize("name", ["full"])
def test_c33_a_step_without_targets_changes_nothing(name):
    """It divides by no weight; the gradients of every method are the next test's."""
    model = small(name)
    ((ids, mask),) = examples([9])
    run = training(model, OptimSpec(weight_decay=0.0))
    before = {path: np.array(leaf) for path, leaf in flatten(run.state.trainable).items()}
    (report,) = run.run([batch_of(model.method, [[(ids, np.zeros_like(mask))]])])
    assert (report["loss"], report["grad_norm"], report[BAD_LEAF]) == (0.0, 0.0, -1.0)
    for path, leaf in flatten(run.state.trainable).items():
        assert np.array_equal(leaf, before[path]), path


@pytest.mark.parametrize("name", METHODS)
def test_c33_a_batch_without_targets_gives_no_gradient(name):
    """0/0 in a batch without targets: https://github.com/hiyouga/LLaMA-Factory/issues/2916."""
    model = small(name)
    ((ids, mask),) = examples([9])
    for rows in ([[(ids, np.zeros_like(mask))]], [[]]):
        loss, weight, grads = model.gradients(batch_of(model.method, rows))
        assert (loss, weight) == (0.0, 0.0)
        assert all(np.array_equal(g, np.zeros_like(g)) for g in grads.values())
