"""Merged weights compute what base and slots compute together."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune.checkpoints.hf_export import config_of
from jaxtune.core.errors import RequestError
from jaxtune.core.tree import flatten, map_paths, unflatten
from jaxtune.models.decoder import abstract_params
from jaxtune.peft.adapter import Adapter
from jaxtune.peft.bitfit import BitFit
from jaxtune.peft.ia3 import Ia3
from jaxtune.peft.lora import Lora
from jaxtune.peft.prefix import Prefix
from jaxtune.peft.prompt import Prompt
from tests.checkpoints.world import (
    BASE,
    CONFIG,
    assert_same_logits,
    logits_of,
    probe,
    random_params,
)

MERGEABLE = {
    "lora": Lora(rank=3),
    "lora_head": Lora(rank=3, targets=("lm_head", "q_proj")),
    "rslora": Lora(rank=3, variant="rslora"),
    "dora": Lora(rank=3, variant="dora"),
    "pissa": Lora(rank=3, variant="pissa"),
    "ia3": Ia3(),
    "ia3_all": Ia3(targets="all-linear"),
    "bitfit": BitFit(),
    "bitfit_mlp": BitFit(targets=r"blocks/mlp/.*"),
}
BIASED = dataclasses.replace(CONFIG, attention_bias=True, attention_out_bias=True, mlp_bias=True)


@pytest.mark.parametrize("config", [CONFIG, BIASED], ids=["plain", "biases"])
@pytest.mark.parametrize("name", MERGEABLE)
def test_merged_logits_equal_the_slots(name, config):
    method = MERGEABLE[name]
    params = random_params(config, method)
    merged = method.merge(params)
    shape_config = config_of(config, merged)
    expected = abstract_params(shape_config, BASE)
    zeros = map_paths(lambda path, leaf: jnp.zeros(leaf.shape), expected)
    whole = flatten(zeros) | flatten(merged)
    assert whole.keys() == flatten(expected).keys()
    rows = probe()
    slots = logits_of(config, method, params, rows)
    assert_same_logits(logits_of(shape_config, BASE, unflatten(whole), rows), slots)
    base = {path: leaf for path, leaf in flatten(params).items() if path in base_paths(config)}
    plain = logits_of(config, BASE, unflatten(base), rows)
    if not (name.startswith("bitfit") and config is BIASED):  # there it adds nothing
        assert max(np.abs(a - b).max() for a, b in zip(plain, slots, strict=True)) > 1e-2


def base_paths(config) -> set[str]:
    return set(flatten(abstract_params(config, BASE)))


@pytest.mark.parametrize("name", MERGEABLE)
def test_merging_keeps_the_dtype_and_computes_in_float32(name):
    method = MERGEABLE[name]
    exact = method.merge(random_params(CONFIG, method))
    base = base_paths(CONFIG)

    def halve(path, leaf):
        return leaf.astype(jnp.bfloat16) if path in base else leaf

    rounded = random_params(CONFIG, method)
    merged = method.merge(map_paths(halve, rounded))
    for path, leaf in flatten(merged).items():
        assert leaf.dtype == jnp.bfloat16, path
        # two roundings, of the base and of the result, and what DoRA's norm makes of the first
        np.testing.assert_allclose(
            leaf.astype(jnp.float32), flatten(exact)[path], rtol=2**-6, atol=2**-6
        )


@pytest.mark.parametrize("method", [Adapter(), Prompt(), Prefix()], ids=lambda m: m.name)
def test_what_cannot_be_merged_says_so(method):
    with pytest.raises(RequestError, match="cannot be merged"):
        method.merge(jax.tree.map(lambda a: a, random_params(CONFIG, method)))
