"""Several adapters on one base: named, switched, weighed, merged one at a time."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

import jaxtune
from jaxtune.checkpoints import native_adapter, peft_files
from jaxtune.checkpoints.hf import load_params, read_config
from jaxtune.core.errors import RequestError
from jaxtune.core.tree import flatten, unflatten
from jaxtune.peft.bitfit import BitFit
from jaxtune.peft.ia3 import Ia3
from jaxtune.peft.lora import Lora
from jaxtune.peft.method import Method
from jaxtune.peft.prompt import Prompt
from tests.checkpoints.world import random_params
from tests.goldens import tiny

pytestmark = pytest.mark.slow
IDS = np.random.default_rng(0).integers(3, 97, (2, 12))
METHODS = {
    "a": Lora(rank=3, alpha=4.0, targets=("q_proj", "up_proj")),
    "b": Lora(rank=2, variant="rslora", targets=("q_proj", "down_proj")),
    "pissa": Lora(rank=2, variant="pissa", targets=("up_proj",)),
    "norm": Lora(rank=2, targets=("v_proj",), train=("final_norm/scale",)),
    "dora": Lora(rank=2, variant="dora", targets=("q_proj",)),
    "ia3": Ia3(),
    "ia3 q": Ia3(targets=("q_proj", "down_proj")),
    "prompt": Prompt(num_tokens=3),
    "bitfit": BitFit(),
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tiny.write_llama(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def world(directory, tmp_path_factory):
    """(model with all adapters beside it, {name: all parameters with that adapter})."""
    lm, made = jaxtune.load(directory, dtype="float32"), {}
    base = flatten(lm.params)
    for seed, (name, method) in enumerate(METHODS.items()):
        own = flatten(random_params(lm.config, method, seed=seed))
        trained = {p: base[p] * 1.5 for p in method.train} | {
            p: x for p, x in own.items() if name == "bitfit" and p.endswith("bias")
        }
        made[name] = unflatten(own | base | trained)
        path = tmp_path_factory.mktemp("adapter")
        save = native_adapter if name in ("bitfit", "pissa") else peft_files
        save.save_adapter(path, lm.config, method, made[name], str(directory))
        lm = lm.add_adapter(name, path)
    return lm, made


def delta(lm, made, name):
    """What an adapter changes in the base's weights, by merging it whole."""
    merged = flatten(METHODS[name].merge(made[name]))
    return {path: merged[path] - leaf for path, leaf in flatten(lm.stand.params).items()}


def moved(lm, made, weights):
    """The base's parameters plus the weighted sum of what the adapters change."""
    base = dict(lm.stand.params)
    for name, weight in weights.items():
        for path, change in delta(lm, made, name).items():
            base[path] = base[path] + weight * change
    return dataclasses.replace(lm.use(None), params=unflatten(base))


def assert_same(left, right, ids=IDS):
    np.testing.assert_allclose(left.logits(ids), right.logits(ids), rtol=1e-4, atol=1e-4)


def test_adding_an_adapter_changes_nothing_in_use(world, directory):
    lm, _ = world
    assert lm.adapters == tuple(METHODS) and lm.active is None
    plain = jaxtune.load(directory, dtype="float32")
    assert plain.adapters == ()
    assert np.array_equal(lm.logits(IDS), plain.logits(IDS))


@pytest.mark.parametrize("name", ["a", "norm", "bitfit"])
def test_switching(name, world):
    lm, made = world
    other = lm.use("b").use(name)
    assert other.active == name and other.method.name == METHODS[name].name
    expected = dataclasses.replace(lm, method=METHODS[name], params=made[name])
    assert_same(other, expected)
    assert np.array_equal(other.use(None).logits(IDS), lm.logits(IDS))
    kept = flatten(other.params)
    assert all(kept[p] is leaf for p, leaf in lm.stand.params.items() if p.endswith("kernel"))


@pytest.mark.parametrize(
    "weights",
    [
        {"a": 0.7, "b": -0.4},
        {"a": 1.0, "b": 1.0, "pissa": 0.5, "norm": 0.3},
        {"ia3": 0.5, "ia3 q": 0.25},
    ],
    ids=lambda w: "+".join(w),
)
def test_weights_sum_what_the_adapters_change(weights, world):
    """The oracle merges each adapter into the base and adds the weighted differences."""
    lm, made = world
    both = lm.use(weights)
    assert_same(both, moved(lm, made, weights))


def test_one_adapter_with_weight_one_is_that_adapter(world):
    lm, _ = world
    assert lm.use({"dora": 1.0}).method == METHODS["dora"]
    assert lm.use({}).method == Method()


def test_merging_one_keeps_the_rest(world):
    lm, made = world
    merged = lm.merge("a")
    assert merged.adapters == tuple(name for name in METHODS if name != "a")
    assert merged.active is None and merged.method == Method()
    assert_same(merged, lm.use("a"))
    assert_same(merged.use("b"), moved(lm, made, {"a": 1.0, "b": 1.0}))
    assert "a" in lm.adapters  # nothing was changed in place


def test_a_merge_that_needs_biases_and_its_export(world, tmp_path):
    lm, _ = world
    small = dataclasses.replace(
        lm, stand=dataclasses.replace(lm.stand, adapters={"bitfit": lm.stand.adapters["bitfit"]})
    )
    merged = small.merge("bitfit")
    assert merged.config.mlp_bias and merged.adapters == ()
    assert_same(merged, lm.use("bitfit"))
    merged.save(tmp_path, "hf")
    config = dataclasses.replace(read_config(tmp_path)[0], dtype="float32")
    again = dataclasses.replace(merged, params=load_params(tmp_path, config, dtypes="float32"))
    assert_same(again, merged)


def test_a_merge_is_computed_in_float32(directory, world, tmp_path):
    lm, made = world
    peft_files.save_adapter(tmp_path, lm.config, METHODS["a"], made["a"], "base")
    half = jaxtune.load(directory, adapter=tmp_path, dtype="bfloat16")
    assert half.adapters == ("default",) and half.active == "default"
    kernel = half.merge("default").params["blocks"]["mlp"]["up_proj"]["kernel"]
    parts = half.params["blocks"]["mlp"]["up_proj"]
    exact = parts["kernel"].astype(jnp.float32) + METHODS["a"].scale * (
        parts["lora"]["a"] @ parts["lora"]["b"]
    )
    assert kernel.dtype == jnp.bfloat16
    assert np.array_equal(kernel, exact.astype(jnp.bfloat16))


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda lm: lm.use("A"), "no adapter 'A'; there are a, b"),
        (lambda lm: lm.use({"a": 0.5, "zz": 1.0}), "no adapter 'zz'"),
        (lambda lm: lm.use({"a": 0.5, "dora": 0.5}), "only LoRA adapters .but DoRA."),
        (lambda lm: lm.use({"a": 0.5, "ia3": 0.5}), "these are ia3, lora"),
        (lambda lm: lm.use({"prompt": 0.5}), "these are prompt"),
        (lambda lm: lm.use({"a": float("nan"), "b": 1.0}), "not finite"),
        (lambda lm: lm.merge("prompt"), "'prompt' cannot be merged"),
        (lambda lm: lm.merge("bitfit").use("bitfit"), "'bitfit'"),
        (lambda lm: lm.add_adapter("a", "there"), "'a' is taken"),
        (lambda lm: lm.add_adapter("new", "there"), "no such adapter directory"),
    ],
)
def test_what_cannot_be_is_refused(act, message, world):
    with pytest.raises(RequestError, match=message):
        act(world[0])
