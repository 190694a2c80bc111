"""config.json to ModelConfig and back; `test_families_live.py` compares with transformers."""

import dataclasses
import json
import math

import numpy as np
import pytest

from jaxtune.core.errors import RequestError
from jaxtune.models.families import registry
from jaxtune.models.families.table import Weight, rows
from jaxtune.models.rope import Rope
from tests.goldens import tiny

LLAMA = tiny.llama_config()
LLAMA3 = tiny.LLAMA3_ROPE
FAMILY_CONFIGS = {
    "llama": {"model_type": "llama", "architectures": ["LlamaForCausalLM"]},
    "mistral": {"model_type": "mistral", "architectures": ["MistralForCausalLM"]},
    "qwen2": {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]},
    "qwen3": {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]},
}
COMMON = {
    name: value
    for name, value in LLAMA.items()
    if name not in ("model_type", "architectures", "attention_bias", "mlp_bias")
}


def raw(family: str, **fields) -> dict:
    return COMMON | FAMILY_CONFIGS[family] | fields


def test_llama_fields():
    config = registry.from_hf(LLAMA | {"attention_bias": True, "mlp_bias": True})
    assert config.family == "llama"
    assert (config.vocab_size, config.hidden_size, config.intermediate_size) == (97, 32, 48)
    assert (config.num_layers, config.num_heads, config.num_kv_heads) == (3, 4, 2)
    assert (config.head_dim, config.max_position_embeddings) == (8, 128)
    assert config.attention_bias and config.attention_out_bias and config.mlp_bias
    assert config.kinds[0].rope == Rope(theta=5000.0)
    assert (config.norm_eps, config.activation, config.tie_embeddings) == (1e-5, "silu", False)


def test_absent_fields_have_the_values_that_transformers_gives_them():
    required = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
    )
    small = {name: COMMON[name] for name in required}
    llama = registry.from_hf(small | {"model_type": "llama"})
    assert (llama.num_kv_heads, llama.head_dim, llama.norm_eps) == (4, 8, 1e-6)
    assert (llama.max_position_embeddings, llama.kinds[0].rope) == (2048, Rope(theta=10000.0))
    assert registry.from_hf(small | {"model_type": "mistral"}).kinds[0].window == 4096
    assert registry.from_hf(small | {"model_type": "qwen3"}).head_dim == 128
    for name in required:
        with pytest.raises(RequestError, match=f"{name}: the field is missing"):
            registry.from_hf(
                {k: v for k, v in small.items() if k != name} | {"model_type": "llama"}
            )


@pytest.mark.parametrize("family", FAMILY_CONFIGS)
@pytest.mark.parametrize("scaling", [None, {"rope_type": "linear", "factor": 2.0}, LLAMA3])
def test_config_round_trip(family, scaling):
    config = registry.from_hf(raw(family, rope_scaling=scaling, tie_word_embeddings=True))
    written = json.loads(json.dumps(registry.to_hf(config)))
    assert registry.from_hf(written) == config


def test_both_spellings_of_the_rotary_scaling_are_one():
    for scaling in ({}, {"rope_type": "linear", "factor": 4.0}, LLAMA3):
        old = tiny.llama_config(rope_scaling=scaling or None)
        new = tiny.llama_config(rope_style="parameters", rope_scaling=scaling or None)
        assert registry.from_hf(old) == registry.from_hf(new)
    older = LLAMA | {"rope_scaling": {"type": "linear", "factor": 4.0}}
    assert registry.from_hf(older).kinds[0].rope == Rope(5000.0, scaling="linear", factor=4.0)


def test_llama3_context_defaults_to_the_models():
    scaling = {k: v for k, v in LLAMA3.items() if k != "original_max_position_embeddings"}
    assert registry.from_hf(LLAMA | {"rope_scaling": scaling}).kinds[0].rope.original_context == 128


@pytest.mark.parametrize(
    ("key", "fields"),
    [
        ("model_type", {"model_type": "lama"}),
        ("model_type", {"model_type": None}),
        ("model_type", {"model_type": ["llama"]}),
        ("architectures", {"architectures": ["LlamaForTokenClassification"]}),
        ("id2label", {"architectures": ["LlamaForSequenceClassification"]}),  # of two labels
        ("architectures", {"architectures": 3}),
        ("architectures", {"architectures": "LlamaForCausalLM"}),
        ("num_hidden_layers", {"num_hidden_layers": 10**12}),
        ("vocab_size", {"vocab_size": 10**18}),
        ("rms_norm_eps", {"rms_norm_eps": float("inf")}),
        ("rope_theta", {"rope_theta": float("nan")}),
        ("rope_scaling.factor", {"rope_scaling": {"type": "linear", "factor": float("inf")}}),
        ("hidden_act", {"hidden_act": "mish"}),
        ("pretraining_tp", {"pretraining_tp": 0}),
        ("partial_rotary_factor", {"partial_rotary_factor": 0.5}),
        ("rope_scaling.rope_type", {"rope_scaling": {"rope_type": "yarm", "factor": 4.0}}),
        ("rope_scaling.factor", {"rope_scaling": {"type": "dynamic"}}),
        ("rope_scaling.rope_type", {"rope_scaling": {"rope_type": None, "type": ["x"]}}),
        ("rope_scaling", {"rope_scaling": "linear"}),
        ("rope_scaling.factor", {"rope_scaling": {"rope_type": "linear"}}),
        ("rope_scaling.factor", {"rope_scaling": {"rope_type": "linear", "factor": "2"}}),
        ("rope_scaling.beta_fast", {"rope_scaling": LLAMA3 | {"beta_fast": 32}}),
        ("rope_scaling.high_freq_factor", {"rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}}),
        ("rope_parameters", {"rope_scaling": LLAMA3, "rope_parameters": {"rope_theta": 1.0}}),
        ("rope_parameters.full_attention", {"rope_parameters": {"full_attention": {}}}),
        ("rope_theta", {"rope_theta": -1.0}),
        ("sliding_window", {"sliding_window": 64}),
        ("quantization_config", {"quantization_config": {"bits": 4}}),
        ("attn_logit_softcapping", {"attn_logit_softcapping": 50.0}),
        ("num_local_experts", {"num_local_experts": 8}),
        ("logit_scale", {"logit_scale": 0.5}),
        ("hidden_size", {"hidden_size": 0}),
        ("hidden_size", {"hidden_size": "32"}),
        ("hidden_size", {"hidden_size": 33}),
        ("vocab_size", {"vocab_size": True}),
        ("num_key_value_heads", {"num_key_value_heads": 3}),
        ("head_dim", {"head_dim": 7}),
        ("rms_norm_eps", {"rms_norm_eps": "1e-5"}),
        ("attention_bias", {"attention_bias": "true"}),
    ],
)
def test_what_is_not_honoured_is_refused_by_name(key, fields):
    with pytest.raises(RequestError) as error:
        registry.from_hf(LLAMA | fields, "dir/config.json")
    assert (error.value.key, error.value.where) == (key, "dir/config.json")


@pytest.mark.parametrize(
    ("family", "key", "fields"),
    [
        ("qwen3", "layer_types", {"layer_types": ["full_attention", "sliding_attention"]}),
        ("qwen2", "attention_bias", {"attention_bias": True}),
        ("mistral", "attention_bias", {"attention_bias": True}),
    ],
)
def test_what_a_relative_does_not_honour_is_refused_by_name(family, key, fields):
    with pytest.raises(RequestError) as error:
        registry.from_hf(raw(family, **fields))
    assert error.value.key == key


def test_notes_and_switched_off_features_are_let_be():
    config = registry.from_hf(LLAMA)
    notes = {
        "_name_or_path": "x",
        "unsloth_version": "1",
        "transformers_version": "4.40.0",
        "sliding_window": None,
        "use_sinks": False,
        "pretraining_tp": 1,
        "attention_dropout": 0.1,
    }
    assert registry.from_hf(LLAMA | notes) == config


def test_what_a_family_cannot_hold_is_refused():
    config = dataclasses.replace(registry.from_hf(raw("qwen2")), mlp_bias=True)
    with pytest.raises(RequestError, match="family 'qwen2' cannot hold mlp_bias=True"):
        registry.to_hf(config)
    with pytest.raises(RequestError, match="'gpt3' cannot be read from or written"):
        registry.to_hf(dataclasses.replace(config, family="gpt3"))


def test_rows_cover_every_parameter():
    table = (Weight("a.{}.w", "blocks/w", transpose=True), Weight("b", "b"))
    assert rows(table, {"b": None}) == {"b": table[1]}
    with pytest.raises(ValueError, match="'c'"):
        rows(table, {"b": None, "c": None})
    assert table[0].names((2, 3, 5)) == ("a.0.w", "a.1.w")
    assert (table[0].tensor_shape((2, 3, 5)), table[1].tensor_shape((7, 8))) == ((5, 3), (7, 8))


@pytest.mark.parametrize("scaling", [None, {"rope_type": "linear", "factor": 3.0}, LLAMA3])
def test_rotary_frequencies_equal_transformers(scaling):
    """C14."""
    pytest.importorskip("torch")
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    fields = LLAMA | {"rope_scaling": dict(scaling) if scaling else None}
    theirs = LlamaRotaryEmbedding(LlamaConfig.from_dict(fields)).inv_freq.numpy()
    config = registry.from_hf(LLAMA | {"rope_scaling": scaling})
    np.testing.assert_allclose(config.kinds[0].rope.frequencies(config.head_dim), theirs, rtol=1e-6)


def test_llama31_frequencies_by_hand():
    """C14: Llama 3.1's own numbers: short waves kept, long ones stretched by 8."""
    rope = Rope(500000.0, scaling="llama3", factor=8.0, original_context=8192)
    plain = 500000.0 ** (-np.arange(0, 128, 2) / 128)
    waves, result = 2 * math.pi / plain, rope.frequencies(128)
    np.testing.assert_allclose(result[waves < 2048], plain[waves < 2048])
    np.testing.assert_allclose(result[waves > 8192], plain[waves > 8192] / 8)
    middle = (waves >= 2048) & (waves <= 8192)
    assert middle.any()
    assert np.all((result <= plain) & (result >= plain / 8 - 1e-12))
