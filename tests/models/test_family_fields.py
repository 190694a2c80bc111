"""config.json fields of single families: absent ones, released spellings, and refusals by name."""

import dataclasses

import pytest

from jaxtune.core.errors import RequestError
from jaxtune.models.config import Experts
from jaxtune.models.families import registry
from jaxtune.models.layers import CLIPPED
from jaxtune.models.rope import Rope
from tests.models.families import EXPERTS, LLAMA, WINDOW

SIZES = {"head_dim": 8, "moe_intermediate_size": 24}
FULL, SLIDING = "full_attention", "sliding_attention"


def read(model_type: str, **fields):
    base = LLAMA | (SIZES if model_type == "qwen3_moe" else {}) | {"head_dim": 8}
    return registry.from_hf(base | {"model_type": model_type} | fields)


@pytest.mark.parametrize(
    ("family", "key", "fields"),
    [
        ("qwen3_moe", "mlp_only_layers", {"mlp_only_layers": [1]}),
        ("qwen3_moe", "decoder_sparse_step", {"decoder_sparse_step": 2}),
        ("qwen3_moe", "num_local_experts", {"num_local_experts": 4, "num_experts": 8}),
        ("qwen3_moe", "use_qk_norm", {"use_qk_norm": False}),
        (
            "qwen3_moe",
            "shared_expert_intermediate_size",
            {"shared_expert_intermediate_size": 64},
        ),
        ("mixtral", "router_jitter_noise", {"router_jitter_noise": 0.1}),
        ("gpt_oss", "swiglu_alpha", {"swiglu_alpha": 1.5}),
        ("gpt_oss", "swiglu_limit", {"swiglu_limit": 5.0}),
        ("gpt_oss", "layer_types", {"sliding_window": None, "layer_types": [SLIDING] * 3}),
        ("gpt_oss", "quantization_config", {"quantization_config": {"quant_method": "awq"}}),
        ("smollm3", "no_rope_layers", {"no_rope_layers": [1, 0]}),
        ("smollm3", "no_rope_layers", {"no_rope_layers": [0, 0, 0]}),
        ("smollm3", "layer_types", {"layer_types": [SLIDING] * 3, "sliding_window": WINDOW}),
        ("qwen2", "layer_types", {"layer_types": [FULL, FULL, SLIDING]}),
        ("qwen2", "max_window_layers", {"max_window_layers": -1}),
        ("granite", "logits_scaling", {"logits_scaling": 0}),
    ],
)
def test_what_is_not_honoured_is_refused_by_name(family, key, fields):
    with pytest.raises(RequestError) as error:
        read(family, **fields)
    assert error.value.key == key


def test_windows_of_qwen():
    assert read("qwen2", sliding_window=WINDOW).kinds[0].window is None
    on = {"use_sliding_window": True, "sliding_window": WINDOW}
    config = read("qwen2", **on, max_window_layers=1)
    assert [config.kinds[kind].window for kind in config.layer_kinds] == [None, WINDOW, WINDOW]
    assert read("qwen3", **on).kinds[0].window is None  # the first 28 layers are full
    types = [SLIDING, FULL, SLIDING]
    config = read("qwen3", **on, max_window_layers=0, layer_types=types)
    assert [config.kinds[kind].window for kind in config.layer_kinds] == [WINDOW, None, WINDOW]
    assert registry.to_hf(config)["layer_types"] == types
    # of the experts' family all layers slide
    assert read("qwen3_moe", **on, max_window_layers=3).kinds[0].window == WINDOW
    assert read("qwen3_moe", use_sliding_window=True).kinds[0].window == 4096


def test_absent_fields_have_the_values_that_transformers_gives_them():
    mixtral = read("mixtral")
    assert mixtral.experts == Experts(8, 2)
    assert (mixtral.kinds[0].window, mixtral.kinds[0].rope.theta) == (None, 1e6)
    moe = read("qwen3_moe")
    assert moe.experts == Experts(128, 8, normalise=False) and moe.intermediate_size == 24
    rotated = [kind.rope is not None for kind in read("smollm3", num_hidden_layers=5).kinds]
    assert rotated == [True, False]
    assert read("smollm3", num_hidden_layers=5).layer_kinds == (0, 0, 0, 1, 0)
    granite = read("granite")
    assert (granite.attention_scale, granite.logits_scale) == (1.0, 1.0)
    oss = read("gpt_oss")
    assert oss.experts == Experts(128, 4, router_bias=True, bias=True)
    assert (oss.activation, oss.attention_bias, oss.attention_sinks) == (CLIPPED, True, True)
    assert [oss.kinds[kind].window for kind in oss.layer_kinds] == [128, None, 128]
    rope = oss.kinds[0].rope
    assert (rope.scaling, rope.factor, rope.truncate, rope.theta) == ("yarn", 32.0, False, 150000.0)


def test_the_released_spellings_of_gpt_oss():
    """As huggingface.co/openai/gpt-oss-20b has them, but for the sizes."""
    config = read(
        "gpt_oss",
        **EXPERTS,
        experts_per_token=2,
        initial_context_length=4096,
        num_local_experts=4,
        quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]},
        rope_scaling={
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "factor": 32.0,
            "original_max_position_embeddings": 4096,
            "rope_type": "yarn",
            "truncate": False,
        },
        rope_theta=150000,
        swiglu_limit=7.0,
    )
    assert config.experts.per_token == 2
    assert config.kinds[0].rope == read("gpt_oss").kinds[0].rope
    assert "quantization_config" not in registry.to_hf(config)  # an export holds plain numbers


@pytest.mark.parametrize("scaling", [6.0, 8.0, 16.0, 49.0, 0.3])
def test_granites_divisor_of_the_logits_survives(scaling):
    config = read("granite", logits_scaling=scaling)
    assert registry.to_hf(config)["logits_scaling"] == scaling
    assert registry.from_hf(registry.to_hf(config)) == config


def test_dynamic_scaling_goes_beyond_its_own_context():
    config = read("llama", rope_scaling={"rope_type": "dynamic", "factor": 2.5})
    assert (config.max_position_embeddings, config.max_context) == (64, 160)
    assert config.kinds[0].rope == Rope(scaling="dynamic", factor=2.5, original_context=64)
    assert read("llama").max_context == 64


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss", "smollm3", "olmo2"])
def test_what_llama_cannot_hold_is_named(family):
    lost = registry.not_held(dataclasses.replace(read(family, num_hidden_layers=4), family="llama"))
    assert lost
    assert registry.not_held(read(family)) == []
