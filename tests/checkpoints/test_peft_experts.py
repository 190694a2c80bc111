"""LoRA on experts and routers: directories of the real peft in, and ours in the real peft (C17)."""

import dataclasses
import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jaxtune
from jaxtune.checkpoints.peft_files import load_adapter, read_method, save_adapter
from jaxtune.core.errors import RequestError
from jaxtune.core.tree import flatten, unflatten
from jaxtune.peft.lora import Lora
from jaxtune.peft.method import Method
from tests.checkpoints import torch_models as theirs
from tests.checkpoints.world import logits_of
from tests.models import family_training as checks
from tests.models.family_checks import error, world
from tests.models.family_training import ROUTED, adapted, adapter_error, training_error

peft = pytest.importorskip("peft")
pytest.importorskip("torch")
pytestmark = pytest.mark.slow

FAMILIES = ("mixtral", "qwen3_moe", "gpt_oss")
SETTINGS = {
    "mixtral": {"target_modules": "all-linear"},  # router and experts, gate_up_proj of twice r
    "qwen3_moe": {
        "target_modules": ["q_proj"],
        "target_parameters": ["mlp.experts.down_proj", "gate.weight"],
        "use_rslora": True,
    },
    "gpt_oss": {
        "target_modules": [],
        "target_parameters": ["layers.1.mlp.experts.gate_up_proj", "down_proj", "router.weight"],
        "rank_pattern": {"down_proj": 2},
        "alpha_pattern": {"layers.1.mlp.experts.gate_up_proj": 11},
    },
}


def settings_of(name: str, **changes):
    return peft.LoraConfig(
        r=4, lora_alpha=6, task_type="CAUSAL_LM", **{**SETTINGS[name], **changes}
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_theirs_compute_the_same_here_and_are_written_back(name, tmp_path):
    directory = world(name).directory
    expected = theirs.write_adapter(tmp_path / "in", directory, settings_of(name))
    lm = jaxtune.load(directory, adapter=tmp_path / "in", dtype="float32")
    np.testing.assert_allclose(lm.logits(theirs.ROWS), expected, rtol=1e-4, atol=1e-4)
    merged = lm.__class__(None, lm.config, lm.method.merge(lm.params), Method(), lm.mesh, "")
    np.testing.assert_allclose(merged.logits(theirs.ROWS), expected, rtol=1e-4, atol=1e-4)
    lm.save(tmp_path / "out", "peft")
    before, after = (load_file(tmp_path / d / "adapter_model.safetensors") for d in ("in", "out"))
    assert before.keys() == after.keys()
    assert all(before[key].tobytes() == after[key].tobytes() for key in before)
    again = theirs.peft_logits(directory, tmp_path / "out")
    np.testing.assert_array_equal(again, expected)


@pytest.mark.parametrize("name", FAMILIES)
def test_ours_train_as_the_merged_kernels_and_say_the_same_in_peft(name, tmp_path):
    """torch's gradients of the merged model, and an export that the real peft loads whole."""
    assert training_error(name, tmp_path, ROUTED) < 1e-4
    assert adapter_error(name, tmp_path / "adapter", ROUTED) < 1e-4
    theirs.peft_logits(world(name).directory, tmp_path / "adapter")  # checks every key
    fields = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    router = "mlp.router.weight" if name == "gpt_oss" else "mlp.gate.weight"
    experts = ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]
    assert fields["target_parameters"] == sorted([*experts, router])
    # gates and linear halves have an A each: stacked, B is block-diagonal
    assert fields["rank_pattern"] == {"mlp.experts.gate_up_proj": 6}
    assert fields["alpha_pattern"] == {"mlp.experts.gate_up_proj": 10}


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_equal_as_are_written_once(name, tmp_path):
    w, ours = world(name), flatten(adapted(name, ROUTED).params)
    gate, up = (f"blocks/mlp/experts/{half}_proj/lora/a" for half in ("gate", "up"))
    ours[gate] = ours[up]
    save_adapter(tmp_path, w.config, ROUTED, unflatten(ours), "base")
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    assert fields["r"] == 3 and not fields["rank_pattern"]
    method = read_method(tmp_path, w.config)
    assert (method.rank, method.alpha, method.per_layer) == (3, 5.0, False)
    for path, leaf in load_adapter(tmp_path, w.config, method).items():
        np.testing.assert_array_equal(leaf, ours[path], err_msg=path)


def test_one_half_alone_has_a_b_of_zeros_for_the_other(tmp_path):
    w, method = world("mixtral"), Lora(rank=2, targets=("up_proj",))
    ours = flatten(adapted("mixtral", ROUTED).params)
    ours = {path: leaf for path, leaf in ours.items() if "/up_proj/lora/" in path}
    cut = {"a": (..., slice(2)), "b": (..., slice(2), slice(None))}  # to the first 2 ranks
    ours = {path: leaf[cut[path[-1]]] for path, leaf in ours.items()}
    save_adapter(tmp_path, w.config, method, unflatten(ours), "base")
    found = load_adapter(tmp_path, w.config, read_method(tmp_path, w.config))
    stem = "blocks/mlp/experts/{}_proj/lora/{}"
    assert sorted(found) == sorted(stem.format(h, n) for h in ("gate", "up") for n in "ab")
    assert not np.any(found[stem.format("gate", "b")])
    for name in "ab":
        path = stem.format("up", name)
        np.testing.assert_array_equal(found[path], ours[path])


def test_experts_of_a_family_that_has_none_are_refused(tmp_path):
    config = dataclasses.replace(world("mixtral").config, family="llama")
    with pytest.raises(RequestError, match=r"a llama model .* no 'blocks/mlp/experts/down_proj'"):
        save_adapter(tmp_path / "a", config, ROUTED, adapted("mixtral", ROUTED).params, "base")


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        ("lora_dropout", {"lora_dropout": 0.1}, "0.1 is not supported on"),
        ("use_dora", {"use_dora": True}, "True is not supported on"),
        ("init_lora_weights", {"init_lora_weights": "pissa"}, "'pissa' is not supported on"),
        ("target_parameters", {"target_parameters": "down_proj"}, "a list of names"),
        ("target_parameters", {"target_parameters": ["q_proj.weight"]}, "names no experts"),
    ],
)
def test_what_peft_has_not_for_parameters_is_refused(key, change, message, tmp_path):
    w = world("mixtral")
    fields = {"peft_type": "LORA", "target_parameters": ["down_proj"], "lora_alpha": 8, "r": 2}
    (tmp_path / "adapter_config.json").write_text(json.dumps(fields | change))
    (tmp_path / "adapter_model.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    with pytest.raises(RequestError, match=message) as error:
        read_method(tmp_path, w.config)
    assert error.value.key == key


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_directories_of_transformers_4_have_a_module_an_expert(name, tmp_path):
    """The real peft turns them into parameters while it loads them; dropout it would refuse."""
    w, rank = world(name), 2
    rng = np.random.default_rng(0)
    stem = "model.layers.{}." + ("block_sparse_moe" if name == "mixtral" else "mlp")
    names = ("w1", "w3", "w2") if name == "mixtral" else ("gate_proj", "up_proj", "down_proj")
    d, f = w.config.hidden_size, w.config.intermediate_size
    sizes = {n: (d, f) if n != names[2] else (f, d) for n in names}
    tensors = {}
    for layer in range(w.config.num_layers):
        places = {f"experts.{e}.{n}": sizes[n] for e in range(4) for n in names}
        for place, (d_in, d_out) in (places | {"gate": (d, 4)}).items():
            for side, shape in (("A", (rank, d_in)), ("B", (d_out, rank))):
                key = f"base_model.model.{stem.format(layer)}.{place}.lora_{side}.weight"
                tensors[key] = 0.3 * rng.standard_normal(shape, np.float32)
    fields = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": 3,
        "target_modules": [*names, "gate"],
    }
    (tmp_path / "adapter_config.json").write_text(json.dumps(fields))
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    expected = checks.peft_logits(w, tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps(fields | {"lora_dropout": 0.1}))
    method = read_method(tmp_path, w.config)
    assert (method.rank, method.per_layer, method.dropout) == (rank, False, 0.0)
    leaves = load_adapter(tmp_path, w.config, method)
    ours = logits_of(w.config, method, unflatten(leaves | flatten(w.params)), w.samples)
    assert error(ours, expected) < 1e-4
