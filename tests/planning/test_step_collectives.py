"""The collectives of the real step on eight host devices."""

from __future__ import annotations

import jax
import pytest

from jaxtune.planning import collectives, hlo
from jaxtune.recipes import scores
from jaxtune.recipes.build import build
from jaxtune.recipes.plans.report import frozen_shapes, step_flops
from jaxtune.recipes.schema.resolve import resolve
from tests.correctness.tiny_runs import SEQ, VOCAB, run_config

pytestmark = pytest.mark.slow
CHUNKS = 4


def compiled(tmp_path, monkeypatch, method):
    """Returns (plan, parsed program) of a run whose loss takes four chunks of its logits."""
    bytes_ = SEQ // CHUNKS * VOCAB * 4
    monkeypatch.setattr(scores, "LOGITS_BYTES", bytes_)
    monkeypatch.setattr(scores, "SPREAD_HEAD", 1)
    config = run_config(
        tmp_path,
        peft={"method": method},
        batch_size=8,
        grad_accum=1,
        mesh={"fsdp": 8},
        model__remat="block",
        data__eval=[],
        eval=None,
    )
    config["model"]["overrides"]["tie_embeddings"] = False
    plan = build(resolve(config))
    with jax.set_mesh(plan.mesh):
        program = plan.step.lower(*plan.abstract_arguments()).compile()
    return plan, hlo.parse(program.as_text())


def runs_of(found, name):
    return sum(c.runs for c in found if any(name in p for p in c.parameters))


def test_a_frozen_head_is_gathered_once_and_frozen_weights_have_no_gradients(tmp_path, monkeypatch):
    plan, program = compiled(tmp_path, monkeypatch, "lora")
    found = collectives.collectives(program)
    assert runs_of(found, "['lm_head']['kernel']") == 1
    assert collectives.gradient_collectives(found, frozen_shapes(plan.parts)) == []


def test_a_trained_head_is_gathered_in_chunks_and_all_gradients_are_summed(tmp_path, monkeypatch):
    plan, program = compiled(tmp_path, monkeypatch, "full")
    found = collectives.collectives(program)
    # Once a chunk of the backward pass; XLA may take those of the forward pass out of their loop.
    assert CHUNKS + 1 <= runs_of(found, "['lm_head']['kernel']") <= 2 * CHUNKS
    # As if the kernels of the blocks were frozen: the sums of their gradients are found.
    names = ("q_proj", "k_proj", "v_proj", "o_proj")
    kernels = [plan.parts.shapes["blocks"]["attn"][n]["kernel"].shape[1:] for n in names]
    assert len(collectives.gradient_collectives(found, kernels)) >= 1
    assert step_flops(plan) > 0
