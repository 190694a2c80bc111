"""Our own adapter layout: every method there and back, and what is refused."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxtune.checkpoints import adapters, native_adapter
from jaxtune.core.errors import RequestError
from jaxtune.core.tree import flatten
from jaxtune.peft.adapter import Adapter
from jaxtune.peft.bitfit import BitFit
from jaxtune.peft.full import Full
from jaxtune.peft.lora import Lora
from jaxtune.peft.prefix import Prefix
from tests.checkpoints.world import CONFIG, random_params

METHODS = [
    Adapter(bottleneck=5, placement="parallel", activation="relu"),
    BitFit(),
    Prefix(num_tokens=3, train=("final_norm/scale",)),
    Lora(rank=2, variant="pissa"),
    Lora(rank=2, per_layer=True, train=("lm_head/kernel",)),
    Full(train=("blocks/mlp/.*",)),
]


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_there_and_back(method, tmp_path):
    params = random_params(CONFIG, method)
    native_adapter.save_adapter(tmp_path, CONFIG, method, params, "base")
    assert adapters.read_method(tmp_path, CONFIG) == method
    leaves = adapters.load_adapter(tmp_path, CONFIG, method)
    flat = flatten(params)
    assert leaves and all(np.array_equal(leaf, flat[path]) for path, leaf in leaves.items())
    assert leaves.keys() == native_adapter.leaf_shapes(CONFIG, method).keys()
    assert not any(path.endswith("embedding") for path in leaves)


def test_the_layout_is_the_documented_one(tmp_path):
    method = Adapter(bottleneck=5, placement="pfeiffer")
    native_adapter.save_adapter(tmp_path, CONFIG, method, random_params(CONFIG, method), "there")
    fields = json.loads((tmp_path / "jaxtune_adapter.json").read_text())
    assert fields["format"] == 1 and fields["base_model_name_or_path"] == "there"
    assert fields["method"] == {
        "name": "adapter",
        "train": [],
        "new_rows": None,
        "bottleneck": 5,
        "placement": "pfeiffer",
        "activation": "gelu",
    }
    tensors = load_file(tmp_path / "jaxtune_adapter.safetensors")
    assert {name: (t.dtype.name, t.shape) for name, t in tensors.items()} == {
        "blocks/adapter_mlp/down/kernel": ("float32", (3, 32, 5)),
        "blocks/adapter_mlp/down/bias": ("float32", (3, 5)),
        "blocks/adapter_mlp/up/kernel": ("float32", (3, 5, 32)),
        "blocks/adapter_mlp/up/bias": ("float32", (3, 32)),
    }


@pytest.mark.parametrize(
    ("fields", "change", "message"),
    [
        ({"format": 2}, None, "2 is not 1"),
        ({"method": {"name": "loha"}}, None, "names no method of this version"),
        ({"method": {"name": "adapter", "width": 3}}, None, "names no method of this version"),
        ({}, lambda t: t.pop("blocks/adapter_mlp/up/bias"), "up/bias' is missing"),
        ({}, lambda t: t.update(x=np.zeros(3, np.float32)), "'x' has no place"),
        (
            {},
            lambda t: t.update({"blocks/adapter_mlp/up/bias": np.zeros((3, 31), np.float32)}),
            r"want a float of shape \[3, 32\]",
        ),
    ],
)
def test_damage_is_refused(fields, change, message, tmp_path):
    method = Adapter(bottleneck=5)
    native_adapter.save_adapter(tmp_path, CONFIG, method, random_params(CONFIG, method), "base")
    file = tmp_path / "jaxtune_adapter.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    if change is not None:
        tensors = load_file(tmp_path / "jaxtune_adapter.safetensors")
        change(tensors)
        save_file(tensors, tmp_path / "jaxtune_adapter.safetensors")
    with pytest.raises(RequestError, match=message):
        adapters.load_adapter(tmp_path, CONFIG, adapters.read_method(tmp_path, CONFIG))


def test_a_full_run_has_no_adapter(tmp_path):
    with pytest.raises(RequestError, match="export format 'hf'"):
        native_adapter.save_adapter(tmp_path / "out", CONFIG, Full(), {}, "base")
    method = Lora(rank=2, new_rows=(59, 2))
    with pytest.raises(RequestError, match="rows of new tokens"):
        native_adapter.save_adapter(tmp_path / "out", CONFIG, method, {}, "base")
