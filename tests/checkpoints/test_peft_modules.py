"""Adapters of the real peft with patterns, saved modules and fused modules, in and out (C17)."""

import json
import re

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jaxtune
from jaxtune.checkpoints.peft_files import read_method, save_adapter
from jaxtune.checkpoints.peft_modules import PREFIX
from jaxtune.core.errors import RequestError
from jaxtune.core.tree import flatten, unflatten
from jaxtune.models.decoder import abstract_params
from jaxtune.peft.ia3 import Ia3
from jaxtune.peft.lora import Lora
from jaxtune.peft.prefix import Prefix
from tests.checkpoints import torch_models as theirs
from tests.checkpoints.world import random_params

peft = pytest.importorskip("peft")
pytest.importorskip("torch")
pytestmark = pytest.mark.slow

LORA = {
    "ranks": (
        "llama",
        {
            "target_modules": ["q_proj", "down_proj"],
            "rank_pattern": {"q_proj": 2, "layers.1.mlp.down_proj": 6},
            "alpha_pattern": {"down_proj": 3},
        },
    ),
    "rslora": (
        "llama",
        {"target_modules": "all-linear", "rank_pattern": {".*[qv]_proj": 2}, "use_rslora": True},
    ),
    "dora": (
        "llama",
        {"target_modules": ["v_proj", "o_proj"], "alpha_pattern": {"o_proj": 1}, "use_dora": True},
    ),
    "layers": ("llama", {"target_modules": r".*layers\.[02]\..*(q|up)_proj"}),
    "saved": (
        "llama",
        {
            "target_modules": ["q_proj", "lm_head"],
            "modules_to_save": ["embed_tokens", "input_layernorm", "model.norm"],
        },
    ),
    "tied embedding": (
        "tied",
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    ),
    "phi3": ("phi3", {"target_modules": "all-linear"}),
    "phi3 saved": (
        "phi3",
        {"target_modules": ["qkv_proj"], "use_dora": True, "modules_to_save": ["gate_up_proj"]},
    ),
    "gpt2": ("gpt2", {"target_modules": ["c_attn", "mlp.c_proj"], "modules_to_save": ["ln_f"]}),
    "gpt_neox": ("gpt_neox", {"target_modules": "all-linear", "use_rslora": True}),
}
IA3 = {
    "llama": {
        "target_modules": r".*layers\.1\..*(k|v|down)_proj",
        "feedforward_modules": r".*down_proj",
    },
    "gpt_neox": {},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Returns a function: the name of a model → its directory."""
    made = {}

    def find(name: str):
        if name not in made:
            made[name] = theirs.write_model(tmp_path_factory.mktemp(name), name)
        return made[name]

    return find


def check_both_ways(directory, settings, tmp_path):
    """Theirs computes the same here, and is written back as the same tensors for the real peft."""
    expected = theirs.write_adapter(tmp_path / "in", directory, settings)
    lm = jaxtune.load(directory, adapter=tmp_path / "in", dtype="float32")
    np.testing.assert_allclose(lm.logits(theirs.ROWS), expected, rtol=1e-4, atol=1e-4)
    lm.save(tmp_path / "out", "peft")
    before, after = (load_file(tmp_path / d / "adapter_model.safetensors") for d in ("in", "out"))
    assert before.keys() == after.keys()
    assert all(before[name].tobytes() == after[name].tobytes() for name in before)
    again = theirs.peft_logits(directory, tmp_path / "out")
    np.testing.assert_allclose(again, expected, rtol=1e-4, atol=1e-4)
    return lm


@pytest.mark.parametrize("case", LORA)
def test_lora_of_peft_in_and_out(case, model, tmp_path):
    name, settings = LORA[case]
    config = peft.LoraConfig(r=4, lora_alpha=6, task_type="CAUSAL_LM", **settings)
    lm = check_both_ways(model(name), config, tmp_path)
    assert lm.method.per_layer == (case in ("ranks", "rslora", "dora", "layers"))


@pytest.mark.parametrize("name", ["llama", "tied"])
def test_a_copy_of_the_base_beside_an_adapter_on_the_head(name, model, tmp_path):
    """What peft writes by default; the copy of another model's head is refused."""
    settings = peft.LoraConfig(r=4, target_modules=["lm_head", "q_proj"], task_type="CAUSAL_LM")
    expected = theirs.write_adapter(tmp_path, model(name), settings, copies=True)
    path, copy = tmp_path / "adapter_model.safetensors", f"{PREFIX}lm_head.base_layer.weight"
    tensors = load_file(path)
    assert copy in tensors
    lm = jaxtune.load(model(name), adapter=tmp_path, dtype="float32")
    np.testing.assert_allclose(lm.logits(theirs.ROWS), expected, rtol=1e-4, atol=1e-4)
    tensors[copy][3, 5] += 1e-3
    save_file(tensors, path)
    with pytest.raises(RequestError, match=r"lm_head.base_layer.weight' is not the base's"):
        jaxtune.load(model(name), adapter=tmp_path, dtype="float32")
    save_file(tensors | {copy: tensors[copy][1:]}, path)
    with pytest.raises(RequestError, match=r"lm_head.base_layer.weight' is not the base's"):
        lm.add_adapter("short", tmp_path)


@pytest.mark.parametrize("name", IA3)
def test_ia3_of_peft_in_and_out(name, model, tmp_path):
    config = peft.IA3Config(task_type="CAUSAL_LM", **IA3[name])
    if name == "llama":
        # scales in some layers: the others have ones here, and are written so
        theirs.write_adapter(tmp_path, model(name), config)
        lm = jaxtune.load(model(name), adapter=tmp_path, dtype="float32")
        expected = theirs.peft_logits(model(name), tmp_path)
        np.testing.assert_allclose(lm.logits(theirs.ROWS), expected, rtol=1e-4, atol=1e-4)
        with pytest.raises(RequestError, match="training would scale it in all"):
            read_method(tmp_path, lm.config, to_train=True)
    else:
        check_both_ways(model(name), config, tmp_path)


OURS = {
    "phi3": Lora(rank=3, alpha=5.0, variant="rslora"),
    "phi3 dora": Lora(rank=3, targets=("q_proj", "up_proj", "o_proj"), variant="dora"),
    "gpt_neox ia3": Ia3(),
    "tied": Lora(rank=2, targets=("v_proj",), train=("embed/embedding",)),
}


@pytest.mark.parametrize("case", OURS)
def test_ours_on_fused_modules_load_in_peft(case, model, tmp_path):
    """A's that differ are stacked, B is block-diagonal, and the scale stays."""
    directory, method = model(case.split()[0]), OURS[case]
    lm = jaxtune.load(directory, dtype="float32")
    own = flatten(random_params(lm.config, method, seed=3))
    params = own | flatten(lm.params)
    for path in params:
        if any(re.fullmatch(regex, path) for regex in method.train):
            params[path] = params[path] + 0.1 * own[path]
    params = unflatten(params)
    save_adapter(tmp_path, lm.config, method, params, str(directory))
    expected = theirs.peft_logits(directory, tmp_path)
    ours = lm.__class__(None, lm.config, params, method, lm.mesh, "")
    np.testing.assert_allclose(ours.logits(theirs.ROWS), expected, rtol=1e-4, atol=1e-4)
    if case == "phi3":
        fields = json.loads((tmp_path / "adapter_config.json").read_text())
        assert fields["rank_pattern"] == {"qkv_proj": 9, "gate_up_proj": 6}
        assert sorted(fields["target_modules"]) == [
            "down_proj",
            "gate_up_proj",
            "o_proj",
            "qkv_proj",
        ]


def test_adapters_that_untie_are_refused_for_training(model, tmp_path):
    settings = peft.LoraConfig(
        target_modules=["q_proj"], modules_to_save=["embed_tokens"], task_type="CAUSAL_LM"
    )
    theirs.write_adapter(tmp_path, model("tied"), settings)
    config = jaxtune.load(model("tied"), dtype="float32").config
    with pytest.raises(RequestError, match=r"untie them with model.overrides.tie_embeddings=False"):
        read_method(tmp_path, config, to_train=True)


def test_the_leaves_that_a_pattern_pads_are_zero(model, tmp_path):
    settings = peft.LoraConfig(
        r=4, target_modules=["q_proj"], rank_pattern={"layers.1.*": 2}, task_type="CAUSAL_LM"
    )
    theirs.write_adapter(tmp_path, model("llama"), settings)
    lm = jaxtune.load(model("llama"), adapter=tmp_path, dtype="float32")
    lora = lm.params["blocks"]["attn"]["q_proj"]["lora"]
    assert lora["a"].shape == (3, 32, 4)
    assert not np.any(lora["a"][1, :, 2:]) and not np.any(lora["b"][1, 2:])
    assert np.all(np.any(lora["a"][jnp.array([0, 2])], axis=1))
    np.testing.assert_allclose(lora["scale"], [2.0, 4.0, 2.0])
    assert set(flatten(abstract_params(lm.config, lm.method))) == set(flatten(lm.params))


def test_gemmas_prompt_is_scaled_as_its_embedding_is(model, tmp_path):
    """transformers scales in the embedding module, beside which PEFT puts the prompt."""
    config = peft.PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")
    expected = theirs.write_adapter(tmp_path / "in", model("gemma3"), config)
    lm = jaxtune.load(model("gemma3"), adapter=tmp_path / "in", dtype="float32")
    np.testing.assert_allclose(lm.logits(theirs.ROWS), expected, rtol=1e-4, atol=1e-4)
    lm.save(tmp_path / "out", "peft")
    again = theirs.peft_logits(model("gemma3"), tmp_path / "out")
    np.testing.assert_allclose(again, expected, rtol=1e-4, atol=1e-4)


def test_a_prefix_on_a_sliding_window_is_refused(model, tmp_path):
    """In PEFT it leaves the window."""
    settings = peft.PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")
    theirs.write_adapter(tmp_path, model("gemma3"), settings)
    lm = jaxtune.load(model("gemma3"), dtype="float32")
    with pytest.raises(RequestError, match="leaves the sliding window of 8"):
        lm.add_adapter("prefix", tmp_path)
    method = Prefix(num_tokens=4)
    with pytest.raises(RequestError, match="leaves the sliding window of 8"):
        save_adapter(tmp_path / "out", lm.config, method, {}, "base")
