import pytest

from jaxtune.core.errors import RequestError
from jaxtune.core.tree import size
from jaxtune.models.decoder import abstract_params
from jaxtune.models.families import registry
from jaxtune.models.presets import PRESETS, preset, with_overrides
from jaxtune.peft.method import Method

# Parameters as the checkpoints' safetensors hold them (the numbers of the Hub's model pages).
PUBLISHED = {
    "smollm2-135m": 134_515_008,  # huggingface.co/HuggingFaceTB/SmolLM2-135M
    "gpt2-124m": 124_439_808,  # huggingface.co/openai-community/gpt2
    "qwen2.5-0.5b": 494_032_768,  # huggingface.co/Qwen/Qwen2.5-0.5B
    "gemma2-2b": 2_614_341_888,  # huggingface.co/google/gemma-2-2b
    "gemma2-9b": 9_241_705_984,  # huggingface.co/google/gemma-2-9b
    "llama3.2-1b": 1_235_814_400,  # huggingface.co/meta-llama/Llama-3.2-1B
    "llama3.1-8b": 8_030_261_248,  # huggingface.co/meta-llama/Llama-3.1-8B
    "llama3.1-70b": 70_553_706_496,  # huggingface.co/meta-llama/Llama-3.1-70B
    "qwen3-8b": 8_190_735_360,  # huggingface.co/Qwen/Qwen3-8B
    "qwen3-30b-a3b": 30_532_122_624,  # huggingface.co/Qwen/Qwen3-30B-A3B
}
OURS = {"tiny-1m": 1_016_960, "small-20m": 20_260_224}


def test_every_name_of_the_interface_is_answered():
    names = (
        "tiny-1m small-20m smollm2-135m gpt2-124m qwen2.5-0.5b llama3.2-1b gemma2-2b gemma2-9b "
        "llama3.1-8b qwen3-8b qwen3-30b-a3b llama3.1-70b"
    )
    assert set(names.split()) == set(PRESETS)


@pytest.mark.parametrize("name", PRESETS)
def test_parameter_counts_are_the_published_ones(name):
    assert size(abstract_params(preset(name), Method())) == (PUBLISHED | OURS)[name]


def test_unknown_names_are_refused():
    with pytest.raises(RequestError, match="did you mean 'tiny-1m'"):
        preset("tiny-1b")


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_can_be_written_and_read(name):
    assert registry.not_held(preset(name)) == []


def test_overrides_replace_fields():
    config = with_overrides(
        preset("llama3.2-1b"),
        {"vocab_size": 300, "norm_eps": 1, "windows": (None, 8), "rope": {"theta": 5}},
    )
    assert (config.vocab_size, config.norm_eps, config.pattern) == (300, 1.0, (0, 1))
    assert [kind.window for kind in config.kinds] == [None, 8]
    assert {(k.rope.theta, k.rope.scaling) for k in config.kinds} == {(5.0, "llama3")}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"vocab": 3},
            "model.overrides.vocab: no such field of a model .did you mean 'vocab_size'",
        ),
        ({"vocab_size": "3"}, "model.overrides.vocab_size: int is wanted"),
        ({"vocab_size": True}, "model.overrides.vocab_size: int is wanted"),
        ({"rope": {"thta": 3.0}}, "model.overrides.rope.thta: no such field"),
        ({"hidden_size": -3}, "model.overrides.hidden_size: -3 is not positive"),
        ({"rope": {"factor": 0}}, "model.overrides.rope.factor: 0.0 is not positive"),
        ({"activation": "gelu_tnah"}, "model.overrides.activation: .*mean 'gelu_tanh'"),
        ({"rope": {"scaling": "yarm"}}, "model.overrides.rope.scaling: 'yarm' is not one of"),
        ({"tie_embeddings": "no"}, "model.overrides.tie_embeddings: bool is wanted"),
        ({"windows": [0]}, "model.overrides.windows: a list of sizes"),
        ({"windows": []}, "model.overrides.windows: a list of sizes"),
        ({"num_kv_heads": 3}, "no multiple"),
        ({"head_dim": 31}, "even width"),
    ],
)
def test_wrong_overrides_are_refused(overrides, message):
    with pytest.raises(RequestError, match=message):
        with_overrides(preset("tiny-1m"), overrides)
