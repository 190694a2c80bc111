"""Bytes of a device, against arrays that lie there and against sums by hand."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from jaxtune.models.presets import preset
from jaxtune.parallel.mesh import abstract_mesh, make_mesh
from jaxtune.peft.full import Full
from jaxtune.peft.lora import Lora
from jaxtune.planning import memory
from jaxtune.recipes.assemble import plan_parts

TINY = dataclasses.replace(preset("tiny-1m"), num_layers=3)
ROWS, TOKENS = 8, 48
D, F = TINY.hidden_size, TINY.intermediate_size


def work(method=None, remat="block", **changes) -> memory.Work:
    config = dataclasses.replace(TINY, remat=remat)
    fields = {"grad_accum": 1, "batch_size": ROWS, "seq_len": TOKENS} | changes
    return memory.Work(config, method or Lora(rank=4), **fields)


@pytest.mark.parametrize("sizes", [{}, {"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_shards_are_counted_as_they_lie(sizes):
    mesh = make_mesh(sizes)
    parts = plan_parts(TINY, Lora(rank=4), mesh)
    placed = jax.tree.map(
        lambda leaf, place: jax.device_put(jnp.zeros(leaf.shape, leaf.dtype), place),
        parts.shapes,
        parts.shardings,
    )
    device = mesh.devices.flat[0]
    there = sum(
        shard.data.nbytes
        for leaf in jax.tree.leaves(placed)
        for shard in leaf.addressable_shards
        if shard.device == device
    )
    assert memory.local_bytes(parts.shapes, parts.shardings) == there


def test_packed_integers_are_counted_by_their_bits():
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    leaf = jax.ShapeDtypeStruct((6, 4), jnp.int4, sharding=one)
    assert memory.local_bytes({"a": leaf}) == 12


@pytest.mark.parametrize(("sizes", "rows"), [({}, ROWS), ({"fsdp": 8}, 1), ({"tensor": 2}, ROWS)])
def test_with_remat_a_layer_keeps_its_input_alone(sizes, rows):
    mesh = abstract_mesh(sizes, 8)
    carry = rows * TOKENS * D * 2
    assert memory.saved_bytes(work(), mesh) == pytest.approx(TINY.num_layers * carry, rel=1e-3)


def test_micro_batches_and_shorter_rows_keep_less():
    mesh = abstract_mesh({}, 1)
    whole = memory.saved_bytes(work(), mesh)
    assert memory.saved_bytes(work(grad_accum=4), mesh) == whole // 4
    assert memory.saved_bytes(work(seq_len=TOKENS // 2), mesh) == whole // 2


def test_what_is_kept_grows_from_block_to_dots_to_none():
    mesh = abstract_mesh({}, 1)
    kept = [memory.saved_bytes(work(remat=r), mesh) for r in ("block", "dots", "none")]
    assert kept[0] < kept[1] < kept[2]
    # q, k, v, the attention's result and gate, up of each token, at the least.
    least = TINY.num_layers * ROWS * TOKENS * 2 * (D + 2 * F)
    assert kept[1] > least


def test_scores_count_only_where_attention_stores_them():
    mesh = abstract_mesh({}, 1)
    stored = memory.block_bytes(work(), mesh)
    flash = memory.block_bytes(work(stores_scores=False), mesh)
    one = ROWS * TINY.num_heads * TOKENS * TOKENS * 4
    assert one <= stored - flash <= 4 * one
    double = memory.block_bytes(work(stores_scores=False, seq_len=2 * TOKENS), mesh)
    assert double == pytest.approx(2 * flash, rel=0.02)


def test_tensor_parallel_devices_hold_their_share_of_a_layer():
    alone = memory.block_bytes(work(stores_scores=False), abstract_mesh({}, 1))
    shared = memory.block_bytes(work(stores_scores=False), abstract_mesh({"tensor": 2}, 2))
    # The inner width is halved, the residual stream is not.
    assert 0.5 * alone < shared < 0.75 * alone


def test_gathered_weights_and_their_gradients():
    layer = 2 * D * D + 2 * D * TINY.num_kv_heads * TINY.head_dim + 3 * D * F
    table = TINY.vocab_size * D
    spread, alone = abstract_mesh({"fsdp": 8}, 8), abstract_mesh({}, 1)
    frozen = memory.gathered_bytes(work(Lora(rank=1, targets=("q_proj",))), spread)
    assert frozen == (pytest.approx(2 * layer, rel=0.01), 2 * table)
    trained = memory.gathered_bytes(work(Full()), spread)
    assert trained == (pytest.approx(3 * 2 * layer, rel=0.01), 3 * 2 * table)
    assert memory.gathered_bytes(work(), alone)[1] == 0  # frozen, and used where it lies
    assert memory.gathered_bytes(work(quantized=True), alone)[0] > 2 * layer
    assert memory.gathered_bytes(work(Full()), alone)[1] == 2 * table  # cast


def test_logits_are_bounded_by_the_chunk():
    mesh = abstract_mesh({}, 1)
    logits = ROWS * TOKENS * TINY.vocab_size * 4
    small = memory.logits_bytes(work(), mesh)
    assert small == memory.LOGITS_COPIES * logits and not memory.chunks_logits(work(), mesh)
    chunked = work(logits_bytes=logits // 8)
    assert memory.chunks_logits(chunked, mesh)
    assert memory.logits_bytes(chunked, mesh) == pytest.approx(small / 8, rel=0.01)
