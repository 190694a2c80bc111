"""Checkpoints whose tensors have older names, beside tensors that carry nothing."""

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxtune.checkpoints.hf import load_params, read_config
from jaxtune.checkpoints.hf_export import save_hf
from jaxtune.checkpoints.hf_tensors import WEIGHTS
from jaxtune.core.errors import RequestError
from jaxtune.models.families import registry
from tests.checkpoints.world import BASE, random_params
from tests.models.families import ROWS


def written(name: str, directory):
    config = registry.from_hf(ROWS[name])
    params = random_params(config, BASE)
    save_hf(directory, config, params, dtype="float32")
    return params, load_file(directory / WEIGHTS)


@pytest.mark.parametrize(
    ("name", "prefix", "older", "inert"),
    [
        # as openai-community/gpt2 is published
        ("gpt2", "transformer.", "", {"h.0.attn.bias": np.tril(np.ones((1, 1, 4, 4), np.uint8))}),
        ("gpt2", "transformer.", "transformer.", {"transformer.h.1.attn.masked_bias": np.ones(1)}),
        ("gpt_neox", "embed_out.", "lm_head.", {}),
        # as EleutherAI/pythia-70m is published
        (
            "gpt_neox",
            "embed_out.",
            "embed_out.",
            {
                "gpt_neox.layers.0.attention.bias": np.ones((1, 1, 4, 4), bool),
                "gpt_neox.layers.0.attention.masked_bias": np.float32([-1e9]),
                "gpt_neox.layers.0.attention.rotary_emb.inv_freq": np.ones(4, np.float32),
            },
        ),
    ],
)
def test_older_names_are_read(name, prefix, older, inert, tmp_path):
    params, tensors = written(name, tmp_path)
    assert any(tensor.startswith(prefix) for tensor in tensors)
    renamed = {
        older + tensor.removeprefix(prefix) if tensor.startswith(prefix) else tensor: value
        for tensor, value in tensors.items()
    }
    save_file(renamed | inert, tmp_path / WEIGHTS)
    found = load_params(tmp_path, read_config(tmp_path)[0], dtypes="float32")
    assert jax.tree.all(jax.tree.map(np.array_equal, found, params))


def test_a_foreign_tensor_is_refused_by_the_name_it_has_in_the_file(tmp_path):
    _, tensors = written("gpt2", tmp_path)
    bare = {name.removeprefix("transformer."): value for name, value in tensors.items()}
    save_file(bare | {"h.0.crossattention.c_attn.weight": np.ones(3)}, tmp_path / WEIGHTS)
    config = read_config(tmp_path)[0]
    with pytest.raises(RequestError, match=r"no place.*'h\.0\.crossattention\.c_attn\.weight'"):
        load_params(tmp_path, config, dtypes="float32")
    wrong = bare["h.0.ln_1.weight"][:3]
    save_file(bare | {"h.0.ln_1.weight": wrong}, tmp_path / WEIGHTS)
    with pytest.raises(RequestError, match=r"'h\.0\.ln_1\.weight' has shape \[3\]"):
        load_params(tmp_path, config, dtypes="float32")
    both = bare | {"transformer.wte.weight": bare["wte.weight"]}
    save_file(both, tmp_path / WEIGHTS)
    with pytest.raises(RequestError, match=r"no place.*'wte\.weight'"):
        load_params(tmp_path, config, dtypes="float32")
