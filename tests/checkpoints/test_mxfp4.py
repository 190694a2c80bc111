"""gpt-oss with its experts as released: 4-bit blocks and scales."""

import dataclasses
import json

import numpy as np
import pytest

from jaxtune.checkpoints.hf import load_params, read_config
from jaxtune.checkpoints.mxfp4 import Mxfp4File, dequantised, with_mxfp4
from jaxtune.checkpoints.safetensors import TensorWriter, open_tensors
from jaxtune.core.errors import RequestError
from jaxtune.core.tree import flatten

NAMES = ("gate_up_proj", "down_proj")
E, D, F, LAYERS = 3, 32, 64, 2
CONFIG = {
    "model_type": "gpt_oss",
    "architectures": ["GptOssForCausalLM"],
    "vocab_size": 97,
    "hidden_size": D,
    "intermediate_size": F,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_local_experts": E,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "sliding_window": 7,
    "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": []},
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": None,
}


def quantised(rng, outer: int, inner: int) -> dict[str, np.ndarray]:
    """Random blocks and scales of a tensor [E, inner, outer], of about the size of weights."""
    return {
        "_blocks": rng.integers(0, 256, (E, outer, inner // 32, 16), np.uint8),
        "_scales": rng.integers(122, 126, (E, outer, inner // 32), np.uint8),
    }


def write(path, tensors: dict[str, np.ndarray]) -> None:
    entries = {name: (t.dtype, t.shape) for name, t in tensors.items()}
    with TensorWriter(path, entries) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)


def slow(blocks, scales) -> np.ndarray:
    """[E, in, out], a number at a time."""
    magnitude = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
    count, outer, groups, _ = blocks.shape
    out = np.zeros((count, 32 * groups, outer), np.float32)
    for e, o, g, i in np.ndindex(count, outer, groups, 32):
        byte = int(blocks[e, o, g, i // 2])
        four = byte >> 4 if i % 2 else byte & 15
        sign = -1.0 if four >= 8 else 1.0
        out[e, 32 * g + i, o] = sign * magnitude[four % 8] * 2.0 ** (int(scales[e, o, g]) - 127)
    return out


@pytest.fixture
def stored(tmp_path):
    """(file of X_blocks and X_scales, X)."""
    parts = quantised(np.random.default_rng(0), 6, 64)
    write(tmp_path / "x.safetensors", {f"x{suffix}": part for suffix, part in parts.items()})
    return tmp_path / "x.safetensors", slow(*parts.values())


def test_parts_are_read_as_of_the_whole(stored):
    path, whole = stored
    opened = open_tensors(path)
    [(name, file)] = with_mxfp4(dict.fromkeys(opened.entries, opened)).items()
    assert name == "x" and isinstance(file, Mxfp4File)
    assert file.entries["x"].shape == whole.shape == (E, 64, 6)
    assert np.array_equal(file.read("x").astype(np.float32), whole)
    for index in (
        (slice(1, 3), slice(16, 48), slice(2, 5)),
        (slice(0, 2), slice(0, 64), np.array([0, 2, 4])),
        (slice(2, 3),),
    ):
        assert np.array_equal(file.read("x", index).astype(np.float32), whole[index])
        out = np.empty(whole[index].shape, np.float32)
        assert np.array_equal(file.read("x", index, out), whole[index])


def test_dequantised_as_transformers_does():
    torch = pytest.importorskip("torch")
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    rng = np.random.default_rng(1)
    blocks = rng.integers(0, 256, (2, 5, 3, 16), np.uint8)
    scales = rng.integers(100, 150, (2, 5, 3), np.uint8)
    theirs = convert_moe_packed_tensors(
        torch.tensor(blocks), torch.tensor(scales), dtype=torch.float32
    )
    assert np.array_equal(dequantised(blocks, scales).swapaxes(1, 2), theirs.numpy())


def test_blocks_and_scales_must_belong_together(tmp_path):
    parts = quantised(np.random.default_rng(0), 6, 64)
    write(
        tmp_path / "x.safetensors",
        {"x_blocks": parts["_blocks"], "x_scales": parts["_scales"][:, :, :1]},
    )
    opened = open_tensors(tmp_path / "x.safetensors")
    with pytest.raises(RequestError, match="not the bytes of one MXFP4 tensor"):
        with_mxfp4(dict.fromkeys(opened.entries, opened))


def test_another_quantisation_is_refused_by_name(tmp_path):
    fields = CONFIG | {"quantization_config": {"quant_method": "gptq"}}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(RequestError, match="quantization_config"):
        read_config(tmp_path)


@pytest.mark.slow
def test_a_quantised_checkpoint_gives_transformers_logits(tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from tests.checkpoints.world import BASE, logits_of, probe
    from tests.models.family_checks import error, randomise, their_logits

    plain = {name: value for name, value in CONFIG.items() if name != "quantization_config"}
    source = transformers.AutoConfig.for_model(**plain)
    net = transformers.AutoModelForCausalLM.from_config(source, attn_implementation="eager").eval()
    randomise(net)
    tensors = {name: t.numpy() for name, t in net.state_dict().items()}
    rng = np.random.default_rng(0)
    for layer in range(LAYERS):
        for name, (outer, inner) in zip(NAMES, ((2 * F, D), (D, F)), strict=True):
            whole = f"model.layers.{layer}.mlp.experts.{name}"
            parts = quantised(rng, outer, inner)
            del tensors[whole]
            tensors |= {whole + suffix: part for suffix, part in parts.items()}
            with torch.no_grad():
                net.get_parameter(whole).copy_(torch.tensor(slow(*parts.values())))
    write(tmp_path / "model.safetensors", tensors)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    config = dataclasses.replace(read_config(tmp_path)[0], dtype="float32")
    params = load_params(tmp_path, config, dtypes="float32")
    samples = probe(config, (23, 9))
    assert error(logits_of(config, BASE, params, samples), their_logits(net, samples)) < 1e-4
    kernel = flatten(params)["blocks/mlp/experts/up_proj/kernel"]
    assert kernel.shape == (LAYERS, E, D, F)
