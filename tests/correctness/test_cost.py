"""What a step costs: traces, FLOPs, compile time, memory."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxtune
from jaxtune.models import functional
from jaxtune.models.config import ModelConfig
from jaxtune.objectives.logprobs import LOGITS_BYTES, token_scores
from jaxtune.optim.schedules import make_schedule
from jaxtune.optim.transform import OptimSpec, make_transform
from jaxtune.parallel.rules import batch_sharding
from jaxtune.peft.full import Full
from jaxtune.peft.lora import Lora
from jaxtune.recipes import build, sft
from jaxtune.recipes import train as train_recipe
from jaxtune.recipes.assemble import plan_parts
from jaxtune.recipes.sft import sft_loss
from jaxtune.training.compile import abstract_batch, jit_step, make_layout, with_shardings
from jaxtune.training.step import make_train_step
from jaxtune.training.stop import StopRequest
from tests.correctness.runs import run_config
from tests.correctness.small import one_device

pytestmark = pytest.mark.slow

KEYS = {
    "input_ids": np.dtype(np.int32),
    "loss_mask": np.dtype(np.float32),
    "segment_ids": np.dtype(np.int32),
    "positions": np.dtype(np.int32),
}


@pytest.mark.parametrize("grad_accum", [1, 2])
def test_the_step_traces_once_over_a_run_with_evaluation_and_a_resume(
    tmp_path, monkeypatch, grad_accum
):
    """Python runs a step's code only while it is traced."""
    calls = {"step": 0, "evaluation": 0}
    make_step, make_loss = build.make_train_step, sft.sft_loss

    def counted_step(*args, **kwargs):
        step = make_step(*args, **kwargs)

        def run(state, frozen, batch):
            calls["step"] += 1
            return step(state, frozen, batch)

        return run

    def counted_loss(*args, **kwargs):
        loss = make_loss(*args, **kwargs)

        def run(trainable, frozen, batch, key):
            calls["evaluation"] += key is None
            return loss(trainable, frozen, batch, key)

        return run

    monkeypatch.setattr(build, "make_train_step", counted_step)
    monkeypatch.setattr(sft, "sft_loss", counted_loss)
    config = run_config(tmp_path, total_steps=8)
    config.grad_accum = grad_accum
    config.eval = {"every_steps": 2, "batch_size": 2}
    config.checkpoint.every_steps = 3
    with monkeypatch.context() as patch:
        patch.setattr(train_recipe.stop, "on_sigterm", stop_after(5))
        first = jaxtune.train(config, tmp_path / "run")
    assert first.summary["stop_reason"] == "preempted" and 0 < first.summary["step"] < 8
    assert calls == {"step": 1, "evaluation": 1}
    second = jaxtune.train(config, tmp_path / "run")
    assert second.summary["stop_reason"] == "finished" and second.summary["step"] == 8
    assert calls == {"step": 2, "evaluation": 2}  # a new session, once more
    assert [row["step"] for row in second.history if "loss" in row] == list(range(1, 9))
    assert [row["step"] for row in second.history if "eval/loss" in row] == [2, 4, 6, 8]


def stop_after(questions: int):
    """Stands for `on_sigterm`: the signal arrives when the loop has asked so often."""

    class Later(StopRequest):
        asked = 0

        def reached(self, step: int) -> str | None:
            self.asked += 1
            if self.asked >= questions:
                self.signal = "SIGTERM"
            return super().reached(step)

    @contextlib.contextmanager
    def on_sigterm():
        yield Later()

    return on_sigterm


def lowered_step(config: ModelConfig, method, rows: int, width: int):
    """The training step, lowered on shapes alone."""
    mesh = one_device()
    parts = plan_parts(config, method, mesh)
    trained, frozen = parts.split(parts.shapes)
    schedule = make_schedule("constant", 1e-3, 10)
    tx = make_transform(OptimSpec(), parts.labels, trained, schedule)
    layout = make_layout(trained, frozen, parts.shardings, tx, mesh)
    step = jit_step(make_train_step(sft_loss(config, method, 1), tx, schedule, 1), layout)
    batch = abstract_batch(rows, width, KEYS, batch_sharding(mesh))
    with jax.set_mesh(mesh):
        return step.lower(layout.shapes, with_shardings(frozen, layout.frozen), batch)


# XLA counts the body of a scan once: a period of 12 layers puts all of them into the body.
TWELVE = ModelConfig(
    vocab_size=8192,
    hidden_size=512,
    intermediate_size=1536,
    num_layers=12,
    num_heads=8,
    num_kv_heads=8,
    head_dim=64,
    max_position_embeddings=512,
    dtype="float32",
)


def flops(method, monkeypatch) -> float:
    # XLA counts the body of a loop once: the layers are unrolled.
    unrolled = functools.partial(jax.lax.scan, unroll=TWELVE.num_layers)
    monkeypatch.setattr(functional.jax.lax, "scan", unrolled)
    return lowered_step(TWELVE, method, 2, 128).compile().cost_analysis()["flops"]


def test_a_lora_step_costs_at_most_0_72_of_a_full_step(monkeypatch):
    """Differentiating everything and masking afterwards would cost as much as full training."""
    full = flops(Full(), monkeypatch)
    weights = 12 * (4 * 512 * 512 + 3 * 512 * 1536) + 512 * 8192
    assert full > 6 * weights * 2 * 128  # the count does hold twelve layers
    assert flops(Lora(rank=8), monkeypatch) <= 0.72 * full


SHALLOW = ModelConfig(
    vocab_size=256,
    hidden_size=64,
    intermediate_size=128,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    max_position_embeddings=64,
    dtype="float32",
)


def test_compile_time_does_not_grow_with_depth():
    """48 layers in at most 1.3 times the time of 4."""
    deep = dataclasses.replace(SHALLOW, num_layers=48)
    lowered = {c.num_layers: [] for c in (SHALLOW, deep)}

    def seconds(config: ModelConfig) -> float:
        start = time.process_time()  # other processes on the machine do not count
        lowered_step(config, Lora(rank=4), 2, 32).compile()
        return time.process_time() - start

    cache = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        seconds(SHALLOW)  # the first compilation of a process pays for more than itself
        for _ in range(3):
            for config in (SHALLOW, deep):
                jax.clear_caches()
                lowered[config.num_layers].append(seconds(config))
    finally:
        jax.config.update("jax_enable_compilation_cache", cache)
    assert min(lowered[48]) <= 1.3 * min(lowered[4]), lowered


def loss_memory(tokens: int, vocab: int, hidden: int = 64, train_head: bool = False) -> int:
    """Bytes of temporaries of the loss with its gradient, beside the hidden states."""
    arguments = (
        jax.ShapeDtypeStruct((1, tokens, hidden), jnp.float32),
        jax.ShapeDtypeStruct((hidden, vocab), jnp.float32),
        jax.ShapeDtypeStruct((1, tokens), jnp.int32),
    )

    def loss(h, kernel, targets):
        scores = token_scores(lambda x: x @ kernel, h, targets, vocab)
        return jnp.sum(scores.logprobs)

    grad = jax.jit(jax.value_and_grad(loss, argnums=(0, 1) if train_head else 0))
    return grad.lower(*arguments).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("train_head", [False, True], ids=["frozen head", "trained head"])
def test_memory_of_the_loss_does_not_grow_with_vocabulary_times_tokens(train_head):
    """[T, V] logits in float32 would take 1, 4 and 4 GiB here; a few chunks take 128 MiB each."""
    small = loss_memory(2**13, 2**15, train_head=train_head)
    assert 2**13 * 2**15 * 4 == 2**30 > LOGITS_BYTES
    longer = loss_memory(2**15, 2**15, train_head=train_head)
    wider = loss_memory(2**13, 2**17, train_head=train_head)
    per_token = 8 * 64 * 4  # a few arrays as wide as the hidden states
    head = (2**17 - 2**15) * 64 * 4  # and of the head's own size
    assert small <= 3 * LOGITS_BYTES
    assert longer <= small + (2**15 - 2**13) * per_token
    assert wider <= small + 4 * head
