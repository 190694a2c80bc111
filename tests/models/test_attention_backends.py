"""Which back end a run takes, and why."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest

from jaxtune.core.errors import RequestError
from jaxtune.models.attention_backends import BACKENDS, NAMES, Setting, backend, choose, setting_on
from jaxtune.models.presets import CHOICES, preset
from jaxtune.models.rope import Rope
from jaxtune.parallel.mesh import make_mesh
from jaxtune.recipes.schema.keys import ATTENTION

LLAMA, GEMMA = preset("llama3.1-8b"), preset("gemma2-9b")
TPU = Setting("tpu", 8192)
GPU = Setting("gpu", 1000, packed=False, capability=(8, 0))


def but(setting: Setting, **changes) -> Setting:
    return dataclasses.replace(setting, **changes)


def of(config, **changes):
    return dataclasses.replace(config, **changes)


CASES = [
    (LLAMA, TPU, "splash", "8192 tokens on tpu"),
    (GEMMA, TPU, "splash", "8192 tokens on tpu"),
    (LLAMA, but(TPU, tokens=1000), "xla", "a multiple of 128 tokens, not 1000"),
    (LLAMA, but(TPU, prefix=True), "xla", "prefix tuning"),
    (LLAMA, but(TPU, sequence=4), "ring", "over 4 devices"),
    (LLAMA, Setting("cpu", 8192), "xla", "no kernel for cpu"),
    (LLAMA, Setting("cpu", 8192, prefix=True, sequence=2), "ring", "over 2 devices"),
    (LLAMA, GPU, "cudnn", "1000 tokens on gpu"),
    (LLAMA, but(GPU, sequence=2), "ring", "over 2 devices"),
    (LLAMA, but(GPU, packed=True), "xla", "data.packing"),
    (LLAMA, but(GPU, prefix=True), "xla", "prefix tuning"),
    (LLAMA, but(GPU, capability=(7, 5)), "xla", "8.0"),
    (LLAMA, but(GPU, capability=None), "xla", "8.0"),
    (GEMMA, but(GPU, capability=(9, 0)), "xla", "soft cap"),
    (of(LLAMA, attention_sinks=True), GPU, "xla", "sinks"),
    (of(LLAMA, dtype="float32"), GPU, "xla", "float32"),
    (of(LLAMA, head_dim=256), GPU, "xla", "up to 128, not 256"),
    (of(LLAMA, head_dim=256), but(GPU, capability=(9, 0)), "cudnn", ""),
    (of(LLAMA, head_dim=36), GPU, "xla", "multiple of 8"),
    (LLAMA, but(TPU, branches=True), "xla", "not splash: knows no prompts that completions share"),
    (LLAMA, but(GPU, branches=True), "xla", "not cudnn: knows no prompts that completions share"),
]


@pytest.mark.parametrize(("config", "setting", "name", "reason"), CASES)
def test_auto_takes_the_kernel_that_applies_and_says_why(config, setting, name, reason):
    choice = choose(config, setting)
    assert choice.name == name
    assert reason in choice.reason
    assert str(choice) == f"{name} ({choice.reason})"


@pytest.mark.parametrize(("config", "setting", "name", "reason"), CASES)
def test_what_auto_does_not_take_is_refused_by_name(config, setting, name, reason):
    for asked in ("splash", "cudnn", "ring"):
        config = of(config, attention=asked)
        if asked == name:
            assert choose(config, setting).name == name
        else:
            with pytest.raises(RequestError, match=rf"model\.attention: {asked}: .*use auto"):
                choose(config, setting)


@pytest.mark.parametrize("setting", [TPU, GPU, but(TPU, sequence=4), Setting("cpu", 7)])
def test_xla_can_be_asked_for_everywhere(setting):
    assert choose(of(LLAMA, attention="xla"), setting).name == "xla"


@pytest.mark.parametrize("asked", ["auto", "xla", "ring"])
def test_shared_prompts_are_not_spread_over_devices(asked):
    with pytest.raises(RequestError, match=r"data\.packing: .*mesh\.sequence"):
        choose(of(LLAMA, attention=asked), but(TPU, branches=True, sequence=4))


def test_shared_prompts_need_angles_of_their_own():
    kind = dataclasses.replace(LLAMA.kinds[0], rope=Rope(scaling="dynamic"))
    with pytest.raises(RequestError, match=r"data\.packing: .*angles"):
        choose(of(LLAMA, kinds=(kind,)), but(TPU, branches=True))


def test_names_are_the_same_everywhere():
    assert ATTENTION == NAMES == CHOICES["attention"]
    assert set(NAMES) - {"auto"} <= set(BACKENDS)


def test_a_cache_is_read_with_masks():
    for name in BACKENDS:
        assert backend(name, cached=True).reads_mask
    assert backend("auto", cached=False) is BACKENDS["xla"]
    assert backend("heads", cached=True) is BACKENDS["heads"]


@pytest.mark.parametrize(
    ("capability", "found"), [("9.0", (9, 0)), ("12.1", (12, 1)), ("gfx90a", None), (None, None)]
)
def test_a_setting_is_read_from_the_mesh(capability, found):
    setting = setting_on(make_mesh({"sequence": 2}), "cpu", 64, prefix=True, packed=False)
    assert setting == Setting("cpu", 64, True, False, 2, None)
    device = SimpleNamespace(platform="gpu", compute_capability=capability)
    mesh = SimpleNamespace(devices=SimpleNamespace(flat=[device]), shape={"sequence": 1})
    setting = setting_on(mesh, "gpu", 64, prefix=False, packed=True)
    assert setting == Setting("gpu", 64, False, True, 1, found)
