"""Completions that share a prompt in a row equal those behind prompts of their own (C11)."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune.data.batches import Cursor, empty_batch, put_example
from jaxtune.models.attention import Span, visible
from jaxtune.models.config import LayerKind
from jaxtune.models.decoder import hidden_states, logits
from jaxtune.objectives.logprobs import plain_scores, shift
from tests.correctness.small import CONFIG, small

WIDTH = 48
# A layer that sees everything, and one that sees 5 positions: less than a prompt and an answer.
WINDOWED = dataclasses.replace(CONFIG, kinds=(LayerKind(), LayerKind(window=5)), pattern=(0, 1))
KEYS = ("completions", "example_weight", "branches")


def example(prompt: int, sides: list[int], seed: int):
    """(ids, mask, columns) of a prompt and completions of these lengths."""
    rng = np.random.default_rng(seed)
    branches = np.repeat(np.arange(len(sides) + 1), [prompt, *sides]).astype(np.int32)
    ids = rng.integers(1, 97, len(branches)).astype(np.int32)
    mask = (branches > 0).astype(np.float32)
    weight = np.where(branches > 0, np.float32(1 + seed), 0).astype(np.float32)
    return ids, mask, {"completions": branches, "example_weight": weight, "branches": branches}


EXAMPLES = [example(7, [4, 6], 0), example(3, [2, 3, 2], 1), example(1, [3, 1], 2)]


def together(examples, virtual: int):
    batch, cursor = empty_batch(1, WIDTH, virtual, KEYS), Cursor()
    for one in examples:
        cursor = put_example(batch, 0, cursor, *one, shared=True, num_virtual=virtual)
    return batch


def apart(examples, virtual: int):
    """One row a completion."""
    total = sum(one[2]["branches"][-1] for one in examples)
    batch, row, before = empty_batch(total, WIDTH, virtual, KEYS[:2]), 0, 0
    for ids, mask, columns in examples:
        branches = columns["branches"]
        for side in range(1, branches[-1] + 1):
            own = (branches == 0) | (branches == side)
            parts = {n: a[own] for n, a in columns.items() if n != "branches"}
            put_example(
                batch, row, Cursor(completions=before), ids[own], mask[own], parts,
                num_virtual=virtual,
            )  # fmt: skip
            row += 1
        before += branches[-1]
    return batch


@functools.cache
def world(name: str):
    """(params, scores, gradient): of target tokens by completion, and of a loss of them."""
    model = small(name, WINDOWED)
    method = model.method

    def score(params, batch):
        hidden = hidden_states(WINDOWED, method, params, batch).states
        table = logits(WINDOWED, method, params, hidden)
        targets, weights = shift(batch)
        logprobs = plain_scores(table, targets).logprobs
        moved = {n: jnp.pad(batch[n][:, 1:], ((0, 0), (0, 1))) for n in KEYS[:2]}
        return logprobs, weights, moved, table

    def loss(params, batch):
        logprobs, weights, moved, _ = score(params, batch)
        return -jnp.sum(logprobs * weights * moved["example_weight"] * (1 + moved["completions"]))

    return model, jax.jit(score), jax.jit(jax.grad(loss))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["full", "prompt"])
def test_a_shared_prompt_gives_the_logits_of_separate_rows(name):
    model, score, gradient = world(name)
    one = together(EXAMPLES, model.method.num_virtual)
    many = apart(EXAMPLES, model.method.num_virtual)
    found = []
    for batch in (one, many):
        logprobs, weights, moved, table = score(model.params, batch)
        order = np.argsort(np.where(weights > 0, moved["completions"], 99).ravel(), kind="stable")
        order = order[: int((weights > 0).sum())]
        found.append((np.ravel(logprobs)[order], np.reshape(table, (-1, 97))[order]))
    for got, want in zip(*found, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5, rtol=1e-5)
    got, want = (jax.tree.leaves(gradient(model.params, batch)) for batch in (one, many))
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * max(1.0, float(np.abs(b).max())), rtol=1e-5)


def test_a_branch_changes_no_bit_of_another():
    model, score, _ = world("full")
    ids, mask, columns = EXAMPLES[0]
    branches = columns["branches"]
    plain = together(EXAMPLES, 0)
    table = np.asarray(score(model.params, plain)[3])[0]
    for side in (1, 2):
        other = np.where(branches == side, ids % 96 + 1, ids).astype(np.int32)
        batch = together([(other, mask, columns), *EXAMPLES[1:]], 0)
        changed = np.asarray(score(model.params, batch)[3])[0]
        own = (batch["branches"][0] == side) & (batch["segment_ids"][0] == 1)
        first = np.flatnonzero(own)[0]  # the copy of the prompt's last token
        own[first] = False
        real = batch["segment_ids"][0] > 0
        assert np.array_equal(table[real & ~own], changed[real & ~own])
        assert not np.isclose(table[own], changed[own]).all(axis=-1).any()


def test_what_a_branch_sees():
    batch = together([example(3, [2, 1], 0)], 0)
    row = {name: jnp.asarray(array[:, :8]) for name, array in batch.items()}
    span = Span(row["segment_ids"], row["positions"])
    seen = visible(span, span, None, row["branches"])[0, :7, :7].astype(int).tolist()
    # prompt a b [c], c d e of one branch, c f of the other
    assert seen == [
        [1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 1, 0, 0],
        [1, 1, 0, 0, 0, 1, 0],
        [1, 1, 0, 0, 0, 1, 1],
    ]
    near = visible(span, span, 2, row["branches"])[0, :7, :7].astype(int).tolist()
    assert near[5] == [0, 1, 0, 0, 0, 1, 0] and near[6] == [0, 0, 0, 0, 0, 1, 1]


def test_attention_without_a_mask_refuses_branches():
    config = dataclasses.replace(WINDOWED, attention="ring")
    model, _, _ = world("full")
    with pytest.raises(ValueError, match="share a prompt"):
        hidden_states(config, model.method, model.params, together(EXAMPLES, 0))
