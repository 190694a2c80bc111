"""config.json files as they stand on the Hub, and each row of the families' table, both ways."""

import json
from pathlib import Path

import pytest

from jaxtune.core.tree import size
from jaxtune.models.config import LayerKind
from jaxtune.models.decoder import abstract_params
from jaxtune.models.families import registry
from jaxtune.models.presets import preset
from jaxtune.models.rope import Rope
from jaxtune.peft.method import Method
from tests.models.families import ROWS

GEMMA2 = {
    "architectures": ["Gemma2ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_logit_softcapping": 50.0,
    "bos_token_id": 2,
    "cache_implementation": "hybrid",
    "eos_token_id": 1,
    "final_logit_softcapping": 30.0,
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "initializer_range": 0.02,
    "max_position_embeddings": 8192,
    "model_type": "gemma2",
    "pad_token_id": 0,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "torch_dtype": "float32",
    "transformers_version": "4.42.4",
    "use_cache": True,
    "vocab_size": 256000,
}
PHI3 = {
    "architectures": ["Phi3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"},
    "bos_token_id": 1,
    "embd_pdrop": 0.0,
    "eos_token_id": 32000,
    "hidden_act": "silu",
    "hidden_size": 3072,
    "initializer_range": 0.02,
    "intermediate_size": 8192,
    "model_type": "phi3",
    "num_hidden_layers": 32,
    "original_max_position_embeddings": 4096,
    "pad_token_id": 32000,
    "resid_pdrop": 0.0,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
}

# https://huggingface.co/NAME/blob/main/config.json
PUBLISHED = {
    "google/gemma-2b": {
        "architectures": ["GemmaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 2,
        "eos_token_id": 1,
        "head_dim": 256,
        "hidden_act": "gelu",
        "hidden_activation": None,
        "hidden_size": 2048,
        "initializer_range": 0.02,
        "intermediate_size": 16384,
        "max_position_embeddings": 8192,
        "model_type": "gemma",
        "num_attention_heads": 8,
        "num_hidden_layers": 18,
        "num_key_value_heads": 1,
        "pad_token_id": 0,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.38.0.dev0",
        "use_cache": True,
        "vocab_size": 256000,
    },
    "google/gemma-2-2b": GEMMA2
    | {
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_attention_heads": 8,
        "num_hidden_layers": 26,
        "num_key_value_heads": 4,
    },
    "google/gemma-2-9b": GEMMA2
    | {
        "hidden_size": 3584,
        "intermediate_size": 14336,
        "num_attention_heads": 16,
        "num_hidden_layers": 42,
        "num_key_value_heads": 8,
        "sliding_window_size": 4096,
    },
    "google/gemma-3-1b-it": {
        "architectures": ["Gemma3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attn_logit_softcapping": None,
        "bos_token_id": 2,
        "cache_implementation": "hybrid",
        "eos_token_id": [1, 106],
        "final_logit_softcapping": None,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 1152,
        "initializer_range": 0.02,
        "intermediate_size": 6912,
        "max_position_embeddings": 32768,
        "model_type": "gemma3_text",
        "num_attention_heads": 4,
        "num_hidden_layers": 26,
        "num_key_value_heads": 1,
        "pad_token_id": 0,
        "query_pre_attn_scalar": 256,
        "rms_norm_eps": 1e-06,
        "rope_local_base_freq": 10000,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": 512,
        "sliding_window_pattern": 6,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.50.0.dev0",
        "use_cache": True,
        "vocab_size": 262144,
    },
    "openai-community/gpt2": {
        "activation_function": "gelu_new",
        "architectures": ["GPT2LMHeadModel"],
        "attn_pdrop": 0.1,
        "bos_token_id": 50256,
        "embd_pdrop": 0.1,
        "eos_token_id": 50256,
        "initializer_range": 0.02,
        "layer_norm_epsilon": 1e-05,
        "model_type": "gpt2",
        "n_ctx": 1024,
        "n_embd": 768,
        "n_head": 12,
        "n_layer": 12,
        "n_positions": 1024,
        "resid_pdrop": 0.1,
        "summary_activation": None,
        "summary_first_dropout": 0.1,
        "summary_proj_to_labels": True,
        "summary_type": "cls_index",
        "summary_use_proj": True,
        "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
        "vocab_size": 50257,
    },
    "EleutherAI/pythia-70m": {
        "architectures": ["GPTNeoXForCausalLM"],
        "bos_token_id": 0,
        "eos_token_id": 0,
        "hidden_act": "gelu",
        "hidden_size": 512,
        "initializer_range": 0.02,
        "intermediate_size": 2048,
        "layer_norm_eps": 1e-05,
        "max_position_embeddings": 2048,
        "model_type": "gpt_neox",
        "num_attention_heads": 8,
        "num_hidden_layers": 6,
        "rotary_emb_base": 10000,
        "rotary_pct": 0.25,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "transformers_version": "4.24.0",
        "use_cache": True,
        "use_parallel_residual": True,
        "vocab_size": 50304,
    },
    "microsoft/Phi-3-mini-4k-instruct": PHI3
    | {
        "max_position_embeddings": 4096,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "rope_scaling": None,
        "sliding_window": 2047,
        "vocab_size": 32064,
    },
    "microsoft/Phi-4-mini-instruct": PHI3
    | {
        "full_attn_mod": 1,
        "interpolate_factor": 1,
        "lm_head_bias": False,
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "partial_rotary_factor": 0.75,
        # the file's own numbers, of which there are as many, do not matter here
        "rope_scaling": {
            "long_factor": [1.0 + i for i in range(48)],
            "short_factor": [1.0] * 48,
            "type": "longrope",
        },
        "sliding_window": 262144,
        "tie_word_embeddings": True,
        "vocab_size": 200064,
    },
}
# Of the other families, one a line.
MORE = json.loads((Path(__file__).parent / "published.json").read_text())
PUBLISHED |= MORE
# Parameters as the checkpoints' safetensors hold them (the numbers of the Hub's model pages), a
# tied head and buffers not counted.
COUNTS = {
    "google/gemma-2b": 2_506_172_416,
    "google/gemma-2-2b": 2_614_341_888,
    "google/gemma-2-9b": 9_241_705_984,
    "google/gemma-3-1b-it": 999_885_952,
    "openai-community/gpt2": 124_439_808,
    "EleutherAI/pythia-70m": 70_426_624,
    "microsoft/Phi-3-mini-4k-instruct": 3_821_079_552,
    "microsoft/Phi-4-mini-instruct": 3_836_021_760,
    "meta-llama/Llama-2-7b-hf": 6_738_415_616,
    "huggyllama/llama-7b": 6_738_415_616,
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
    "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "HuggingFaceTB/SmolLM2-135M-Instruct": 134_515_008,
    "mistralai/Mistral-7B-v0.1": 7_241_732_096,
    "mistralai/Mixtral-8x7B-v0.1": 46_702_792_704,
    "Qwen/Qwen2.5-0.5B": 494_032_768,
    "Qwen/Qwen3-0.6B": 596_049_920,
    "Qwen/Qwen3-30B-A3B": 30_532_122_624,
    "Qwen/Qwen3-Coder-30B-A3B-Instruct": 30_532_122_624,
    "openai-community/gpt2-medium": 354_823_168,
    "openai-community/gpt2-large": 774_030_080,
    "openai-community/gpt2-xl": 1_557_611_200,
    "EleutherAI/gpt-neox-20b": 20_554_567_680,
    "allenai/OLMo-2-0425-1B": 1_484_916_736,
    "HuggingFaceTB/SmolLM3-3B": 3_075_098_624,
    "ibm-granite/granite-3.1-2b-base": 2_533_531_648,
    "openai/gpt-oss-20b": 20_914_757_184,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_are_read_and_written(name):
    config = registry.from_hf(PUBLISHED[name])
    assert size(abstract_params(config, Method())) == COUNTS[name]
    written = json.loads(json.dumps(registry.to_hf(config)))
    assert registry.from_hf(written) == config


def test_every_family_has_a_published_config():
    assert {fields["model_type"] for fields in PUBLISHED.values()} == set(registry.FAMILIES)


def test_notes_in_published_configs_change_nothing():
    """Fields that no version of the model computes by, or only how, and one by its older name."""
    for name, notes in (
        ("huggyllama/llama-7b", ("max_sequence_length",)),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", ("is_llama_config", "transformers.js_config")),
        ("openai-community/gpt2-large", ("n_special", "predict_special_tokens")),
        ("openai-community/gpt2-xl", ("output_past",)),
        ("Qwen/Qwen3-Coder-30B-A3B-Instruct", ("shared_expert_intermediate_size", "use_qk_norm")),
        ("EleutherAI/gpt-neox-20b", ("attention_probs_dropout_prob", "hidden_dropout_prob")),
    ):
        raw = dict(PUBLISHED[name])
        config = registry.from_hf(raw)
        assert all(raw.pop(note, None) is not None for note in notes)
        assert registry.from_hf(raw) == config
    llama2 = PUBLISHED["meta-llama/Llama-2-7b-hf"]
    assert registry.from_hf(llama2 | {"pretraining_tp": 2}) == registry.from_hf(llama2)
    assert registry.from_hf(PUBLISHED["EleutherAI/gpt-neox-20b"]).activation == "gelu_tanh"


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("gemma2-2b", "google/gemma-2-2b"),
        ("gemma2-9b", "google/gemma-2-9b"),
        ("gpt2-124m", "openai-community/gpt2"),
    ],
)
def test_presets_are_the_published_models(name, model):
    assert preset(name) == registry.from_hf(PUBLISHED[model])


def test_gemma_says_gelu_and_means_tanh():
    config = registry.from_hf(PUBLISHED["google/gemma-2b"])
    assert (config.activation, config.embedding_scale) == ("gelu_tanh", 2048**0.5)
    assert config.norm_unit_offset and config.tie_embeddings


def test_gemma2_slides_on_every_second_layer():
    config = registry.from_hf(PUBLISHED["google/gemma-2-9b"])
    assert config.kinds == (LayerKind(4096), LayerKind(None))
    assert config.layer_kinds == (0, 1) * 21
    assert (config.attention_softcap, config.final_softcap) == (50.0, 30.0)
    assert config.attention_scale == 1 / 16


def test_gemma3_slides_on_five_of_six_layers_with_a_rotation_of_their_own():
    config = registry.from_hf(PUBLISHED["google/gemma-3-1b-it"])
    assert config.kinds == (LayerKind(512, Rope(10000.0)), LayerKind(None, Rope(1000000.0)))
    assert config.pattern[:6] == (0, 0, 0, 0, 0, 1) and config.layer_kinds.count(1) == 4
    assert (config.attention_softcap, config.final_softcap) == (None, None)


def test_phi4_mini_stretches_three_quarters_of_a_head():
    [kind] = registry.from_hf(PUBLISHED["microsoft/Phi-4-mini-instruct"]).kinds
    assert (kind.rope.scaling, kind.rope.fraction, kind.window) == ("longrope", 0.75, 262144)
    assert kind.rope.original_context == 4096
    assert kind.rope.magnitude == pytest.approx(1.1902380714238083)  # sqrt(1 + ln 32 / ln 4096)
    # written for transformers 4, which refuses a fourth field here
    written = registry.to_hf(registry.from_hf(PUBLISHED["microsoft/Phi-4-mini-instruct"]))
    assert set(written["rope_scaling"]) == {"type", "short_factor", "long_factor"}


@pytest.mark.parametrize("kind", ["su", "yarn"])
def test_phi3_says_longrope_by_older_names(kind):
    today = PUBLISHED["microsoft/Phi-4-mini-instruct"]
    older = today | {"rope_scaling": today["rope_scaling"] | {"type": kind}}
    assert registry.from_hf(older) == registry.from_hf(today)


@pytest.mark.parametrize("name", ROWS)
def test_every_row_is_written_as_it_was_read(name):
    config = registry.from_hf(ROWS[name])
    written = json.loads(json.dumps(registry.to_hf(config)))
    assert registry.from_hf(written) == config
