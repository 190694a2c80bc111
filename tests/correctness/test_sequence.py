"""Rows spread over the `sequence` axis give one device's losses and gradients."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune.core.errors import RequestError
from jaxtune.models.config import Experts, LayerKind
from jaxtune.objectives.logprobs import plain_scores, token_scores
from jaxtune.parallel.mesh import make_mesh
from jaxtune.parallel.sequence import balanced, check_tokens, zigzag
from jaxtune.recipes import scores
from tests.correctness.small import (
    CONFIG,
    assert_same_gradients,
    batch_of,
    examples,
    small,
    training,
)

pytestmark = pytest.mark.slow

DENSE = dataclasses.replace(CONFIG, vocab_size=96)
WINDOWED = dataclasses.replace(
    DENSE,
    kinds=(LayerKind(window=7), LayerKind()),
    pattern=(0, 1),
    attention_softcap=3.0,
    attention_sinks=True,
)
ROUTED = dataclasses.replace(DENSE, experts=Experts(count=4, per_token=2))
CONFIGS = {"dense": DENSE, "windowed": WINDOWED, "routed": ROUTED}
CASES = [
    ("full", "dense", {"sequence": 8}),
    ("full", "dense", {"sequence": 2, "fsdp": 4}),
    ("full", "dense", {"sequence": 4, "data": 2}),
    ("full", "windowed", {"sequence": 2, "tensor": 4}),
    ("lora", "dense", {"sequence": 4, "fsdp": 2}),
    ("lora", "dense", {"sequence": 2, "tensor": 2, "data": 2}),
    ("full", "routed", {"sequence": 2, "expert": 2, "fsdp": 2}),
    ("lora", "routed", {"sequence": 4, "tensor": 2}),
    ("prompt", "windowed", {"sequence": 2, "tensor": 2, "fsdp": 2}),
    ("prefix", "dense", {"sequence": 4, "tensor": 2}),
]


def packed(method, seed: int = 0):
    """Rows of one to three examples, one of them full, one empty."""
    lengths = ([5, 19, 2], [41], [11, 20], [7], [3, 3, 30], [45 - method.num_virtual], [30])
    return batch_of(method, [examples(row, seed + i, 96) for i, row in enumerate(lengths)])


@functools.cache
def one_device(name: str, config: str):
    model = small(name, CONFIGS[config])
    return model.gradients(packed(model.method))


@pytest.mark.parametrize(("name", "config", "sizes"), CASES, ids=str)
def test_losses_and_gradients_equal_one_devices(name, config, sizes):
    ring = dataclasses.replace(CONFIGS[config], attention="ring")
    model = small(name, ring, make_mesh(sizes))
    found = model.gradients(packed(model.method))
    assert_same_gradients(found, one_device(name, config), 1e-5)


def test_steps_with_micro_batches_equal_one_devices():
    alone = training(small("lora", DENSE))
    mesh = make_mesh({"sequence": 2, "fsdp": 2, "tensor": 2})
    run = training(small("lora", dataclasses.replace(DENSE, attention="ring"), mesh), grad_accum=2)
    batches = [packed(run.model.method, seed) for seed in (0, 50)]
    for ours, theirs in zip(run.run(batches), alone.run(batches), strict=True):
        for key in ("loss", "grad_norm", "accuracy", "trained_tokens", "tokens"):
            np.testing.assert_allclose(ours[key], theirs[key], rtol=1e-5, err_msg=key)


def test_without_the_ring_the_compiler_gathers_and_the_result_is_the_same():
    model = small("lora", DENSE, make_mesh({"sequence": 4, "fsdp": 2}))
    found = model.gradients(packed(model.method))
    assert_same_gradients(found, one_device("lora", "dense"), 1e-5)


def test_no_device_holds_scores_of_a_whole_row():
    """Compiled, the ring's largest array has fewer than T · T elements a head and row."""
    tokens = 512
    mesh = make_mesh({"sequence": 8})
    config = dataclasses.replace(DENSE, attention="ring", max_position_embeddings=tokens)
    model = small("lora", config, mesh)
    trainable, frozen = model.parts.split(model.params)
    ids = jax.ShapeDtypeStruct((1, tokens), jnp.int32)
    batch = {name: ids for name in ("input_ids", "segment_ids", "positions")}
    batch["loss_mask"] = jax.ShapeDtypeStruct((1, tokens), jnp.float32)
    loss = model.loss

    def grad(trainable, frozen, batch):
        return jax.grad(lambda t: loss(t, frozen, batch, None)[0].sum)(trainable)

    with jax.set_mesh(mesh):
        compiled = jax.jit(grad).lower(trainable, frozen, batch).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * tokens * tokens
    text = compiled.as_text()
    assert "collective-permute" in text
    assert "pred[1,512,512]" not in text and f"f32[1,2,2,{tokens},{tokens}]" not in text


@pytest.mark.parametrize("shards", [2, 4, 8])
def test_zigzag_gives_every_device_the_same_work(shards):
    order = zigzag(16 * shards, shards)
    assert sorted(order) == list(range(16 * shards))
    # a token sees as many as stand before it and itself
    work = (order + 1).reshape(shards, -1).sum(axis=1)
    assert len(set(work)) == 1


def test_only_a_sequence_axis_moves_tokens():
    row = jnp.arange(16)[None]
    assert balanced({"a": row})["a"] is row
    with jax.set_mesh(make_mesh({"sequence": 4})):
        moved = jax.jit(balanced)({"a": row})["a"]
    assert moved[0].tolist() == zigzag(16, 4).tolist()
    assert moved.sharding.shard_shape(moved.shape) == (1, 4)


@pytest.mark.parametrize(("pieces", "tokens"), [(2, 12), (4, 20), (1, 7)])
def test_the_chunked_loss_takes_a_part_of_each_piece(pieces, tokens):
    rng = np.random.default_rng(0)
    table = jnp.asarray(rng.standard_normal((6, 11)), jnp.float32)
    hidden = jnp.asarray(rng.standard_normal((2, tokens, 6)), jnp.float32)
    targets = jnp.asarray(rng.integers(0, 11, (2, tokens)), jnp.int32)

    def total(hidden, scores):
        return jnp.sum(jnp.sin(scores(hidden).logprobs))

    def chunked(hidden):
        # room for two columns, so that chunks do not divide 3, 5 and 7 tokens
        room = {"logits_bytes": 2 * 2 * 11 * 4, "pieces": pieces}
        return token_scores(lambda h: h @ table, hidden, targets, 11, **room)

    def plain(hidden):
        return plain_scores(hidden @ table, targets)

    np.testing.assert_array_equal(chunked(hidden).correct, plain(hidden).correct)
    for ours, theirs in zip(
        jax.value_and_grad(total)(hidden, chunked),
        jax.value_and_grad(total)(hidden, plain),
        strict=True,
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_the_chunked_loss_on_a_mesh_equals_one_devices(monkeypatch):
    """Logits three columns at a time on each device, virtual tokens in the rows."""
    room = {"logits_bytes": 3 * 8 * 96 * 4 // 2}
    monkeypatch.setattr(scores, "token_scores", functools.partial(token_scores, **room))
    fresh = dataclasses.replace(DENSE, attention="ring", max_position_embeddings=63)
    model = small("prompt", fresh, make_mesh({"sequence": 4, "fsdp": 2}))
    found = model.gradients(packed(model.method))
    assert_same_gradients(found, one_device("prompt", "dense"), 1e-5)


def test_rows_that_do_not_divide_are_refused():
    mesh = make_mesh({"sequence": 4})
    check_tokens(48, mesh)
    with pytest.raises(RequestError, match=r"data\.seq_len: .*multiple of 8"):
        check_tokens(52, mesh)
