"""What the backward pass holds: one attention array a layer, and no copy of frozen weights."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from jaxtune.core.tree import flatten, nbytes, unflatten
from jaxtune.models import decoder
from jaxtune.models.presets import preset
from jaxtune.peft.lora import Lora

METHOD = Lora(rank=2, targets=("q_proj",))


def temporaries(config, batch_size: int, tokens: int) -> int:
    """Bytes of temporaries of a LoRA gradient, as XLA counts them."""
    shapes = flatten(decoder.abstract_params(config, METHOD))
    lora = {path: leaf for path, leaf in shapes.items() if "/lora/" in path}
    frozen = {path: leaf for path, leaf in shapes.items() if path not in lora}
    ids = jax.ShapeDtypeStruct((batch_size, tokens), jnp.int32)
    batch = {"input_ids": ids, "segment_ids": ids, "positions": ids}

    def loss(lora, frozen, batch):
        params = unflatten(frozen | lora)
        return decoder.hidden_states(config, METHOD, params, batch)[0].sum()

    compiled = jax.jit(jax.grad(loss)).lower(lora, frozen, batch).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.fixture(scope="module")
def small():
    return dataclasses.replace(preset("tiny-1m"), dtype="float32", vocab_size=16)


def test_frozen_weights_are_not_held_twice(small):
    config = dataclasses.replace(small, num_layers=6)
    weights = nbytes(decoder.abstract_params(config, METHOD)["blocks"])
    assert temporaries(config, 1, 8) < 0.5 * weights


def test_attention_holds_one_array_a_layer(small):
    config = dataclasses.replace(small, hidden_size=16, intermediate_size=16, head_dim=4)
    tokens, batch_size = 256, 2
    found = [
        temporaries(dataclasses.replace(config, num_layers=layers), batch_size, tokens)
        for layers in (2, 6)
    ]
    one = 4 * batch_size * config.num_heads * tokens**2
    assert (found[1] - found[0]) / 4 < 1.5 * one
