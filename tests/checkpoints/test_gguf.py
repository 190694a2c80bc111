"""GGUF files: written, read back tensor by tensor, and read by transformers."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune.checkpoints.gguf_export import FILE, load_gguf, rope_factors, save_gguf
from jaxtune.checkpoints.gguf_tokenizer import split_name
from jaxtune.checkpoints.hf import load_params, read_config
from jaxtune.core.errors import RequestError
from jaxtune.core.tree import flatten
from jaxtune.data.tokenizer import load_tokenizer
from jaxtune.models.config import LayerKind
from jaxtune.models.rope import Rope
from tests.checkpoints.world import BASE, CONFIG, assert_same_logits, logits_of, random_params

gguf = pytest.importorskip("gguf")
# inner widths that blocks of 32 divide, and one that they do not
BLOCKS = dataclasses.replace(CONFIG, intermediate_size=64)
QWEN = dataclasses.replace(BLOCKS, family="qwen2", attention_bias=True, tie_embeddings=True)
# transformers reads no head size of Qwen 3 from GGUF: 128 is its default
MISTRAL = dataclasses.replace(BLOCKS, family="mistral", kinds=(LayerKind(window=96),))
QWEN3 = dataclasses.replace(BLOCKS, family="qwen3", qk_norm="head", head_dim=128)


def read(directory):
    reader = gguf.GGUFReader(directory / FILE)
    tensors = {
        t.name: gguf.quants.dequantize(t.data, t.tensor_type).reshape(
            [int(n) for n in t.shape[::-1]]
        )
        for t in reader.tensors
    }
    kinds = {t.name: t.tensor_type.name for t in reader.tensors}
    return {name: field.contents() for name, field in reader.fields.items()}, tensors, kinds


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """The slow form of llama.cpp's order: pair i of a head is rows i and i + half."""
    out, size = np.empty_like(weight), len(weight) // heads
    for head in range(heads):
        for i in range(size // 2):
            out[head * size + 2 * i] = weight[head * size + i]
            out[head * size + 2 * i + 1] = weight[head * size + size // 2 + i]
    return out


@pytest.mark.parametrize("config", [CONFIG, QWEN], ids=["llama", "qwen2"])
def test_names_shapes_and_order(config, tmp_path):
    params = random_params(config, BASE)
    save_gguf(tmp_path, config, params, dtype="float32", name="tiny")
    fields, tensors, _ = read(tmp_path)
    flat = {path: np.asarray(leaf) for path, leaf in flatten(params).items()}
    q, k = (flat[f"blocks/attn/{name}_proj/kernel"][1].T for name in "qk")
    if config is CONFIG:
        q, k = permuted(q, 4), permuted(k, 2)
    assert np.array_equal(tensors["blk.1.attn_q.weight"], q)
    assert np.array_equal(tensors["blk.1.attn_k.weight"], k)
    assert np.array_equal(tensors["token_embd.weight"], flat["embed/embedding"])
    assert np.array_equal(
        tensors["blk.2.ffn_down.weight"], flat["blocks/mlp/down_proj/kernel"][2].T
    )
    assert ("output.weight" in tensors) == (not config.tie_embeddings)
    name = fields["general.architecture"]
    assert (name, fields["general.name"]) == (config.family, "tiny")
    expected = {
        "block_count": 3,
        "context_length": 96,
        "embedding_length": 32,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.key_length": 8,
        "rope.dimension_count": 8,
        "rope.freq_base": 10000.0,
        "vocab_size": 61,
    }
    assert {key: fields[f"{name}.{key}"] for key in expected} == expected
    assert fields[f"{name}.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-5)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "q8_0"])
def test_what_is_read_back_is_what_was_stored(dtype, tmp_path):
    params = random_params(BLOCKS, BASE)
    config = save_gguf(tmp_path, BLOCKS, params, dtype=dtype)
    again, kinds = flatten(load_gguf(tmp_path, config)), read(tmp_path)[2]
    stored = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0"}[dtype]
    assert {kind for name, kind in kinds.items() if "norm" in name} == {"F32"}
    assert {kind for name, kind in kinds.items() if "norm" not in name} == {stored}
    for path, leaf in flatten(params).items():
        leaf, got = np.asarray(leaf), np.asarray(again[path])
        if path.endswith("scale") or dtype == "float32":
            assert np.array_equal(got, leaf), path
        elif dtype == "q8_0":
            # half a step of the largest of its block, and float16's rounding of the step
            assert np.abs(got - leaf).max() <= np.abs(leaf).max() / 127 * 0.51, path
        else:
            rounded = leaf.astype(jnp.dtype(dtype)).astype(np.float32)
            assert np.array_equal(got, rounded), path


def test_rows_that_blocks_do_not_divide_are_halves(tmp_path):
    save_gguf(tmp_path, CONFIG, random_params(CONFIG, BASE), dtype="q8_0")
    kinds = read(tmp_path)[2]
    assert (kinds["blk.0.ffn_down.weight"], kinds["blk.0.ffn_up.weight"]) == ("F16", "Q8_0")


@pytest.mark.parametrize("config", [BLOCKS, QWEN, MISTRAL, QWEN3], ids=lambda c: c.family)
def test_transformers_reads_the_same_logits(config, tmp_path, shared):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = dataclasses.replace(config, vocab_size=512)
    tokenizer = load_tokenizer(shared / "models" / "stories260k")
    params = random_params(config, BASE)
    save_gguf(tmp_path, config, params, dtype="float32", tokenizer=tokenizer)
    net = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=FILE, dtype=torch.float32
    )
    rows = [np.random.default_rng(0).integers(3, 500, 20).tolist()]
    with torch.no_grad():
        theirs = [net(torch.tensor(rows)).logits[0].numpy()]
    assert_same_logits(logits_of(config, BASE, params, rows), theirs)


def test_a_real_model_with_its_tokenizer(tmp_path, shared):
    transformers = pytest.importorskip("transformers")
    source = shared / "models" / "stories260k"
    config, tokenizer = read_config(source)[0], load_tokenizer(source)
    params = load_params(source, config, dtypes="float32")
    written = save_gguf(tmp_path, config, params, dtype="float32", tokenizer=tokenizer)
    again = flatten(load_gguf(tmp_path, written))
    assert all(np.array_equal(leaf, again[path]) for path, leaf in flatten(params).items())
    fields = read(tmp_path)[0]
    assert fields["tokenizer.ggml.model"] == "llama" and len(fields["tokenizer.ggml.tokens"]) == 512
    assert fields["tokenizer.ggml.token_type"][:5] == [2, 3, 3, 6, 6]
    assert fields["tokenizer.ggml.add_bos_token"] is True
    read_back = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file=FILE)
    for text in ("Once upon a time there was a dragon.\n Hé!", "Lily said: stop"):
        assert read_back(text)["input_ids"] == tokenizer.encode(text)


def test_llama3_frequencies_are_divided_as_stored():
    rope = Rope(theta=5e5, scaling="llama3", factor=8.0, original_context=64)
    factors = rope_factors(rope, 16)
    assert factors.dtype == np.float32 and factors[0] == 1.0 and factors[-1] == 8.0
    np.testing.assert_allclose(
        Rope(theta=5e5).frequencies(16) / factors, rope.frequencies(16), rtol=1e-6
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kinds": (LayerKind(window=8),), "family": "mistral"}, "sliding_window=8"),
        (
            {"kinds": (LayerKind(None, Rope(scaling="dynamic", factor=2.0, original_context=96)),)},
            "rope=dynamic",
        ),
        ({"activation": "gelu"}, "activation=gelu"),
        (
            {
                "family": "qwen3",
                "qk_norm": "head",
                "attention_bias": True,
                "attention_out_bias": True,
            },
            "attention_bias=True, attention_out_bias=True",
        ),
        (
            {
                "family": "qwen2",
                "attention_bias": True,
                "kinds": (
                    LayerKind(None, Rope(scaling="llama3", factor=8.0, original_context=32)),
                ),
            },
            "rope=llama3",
        ),
        (
            {"family": "granite", "attention_scale": 1.0},
            "a granite model cannot be written as GGUF",
        ),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(changes, message, tmp_path):
    config = dataclasses.replace(CONFIG, **changes)
    with pytest.raises(RequestError, match=message):
        save_gguf(tmp_path / "out", config, random_params(CONFIG, BASE), dtype="float32")
    assert not (tmp_path / "out").exists()


def test_splits_have_the_names_of_llama_cpp():
    llama3 = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )

    def split(regex):
        step = {"type": "Split", "pattern": {"Regex": regex}}
        return {"type": "Sequence", "pretokenizers": [step, {"type": "ByteLevel"}]}

    assert split_name(split(llama3)) == "llama-bpe"
    assert split_name(split(llama3.replace("{1,3}", ""))) == "qwen2"
    assert split_name({"type": "ByteLevel", "use_regex": True}) == "gpt-2"
    with pytest.raises(RequestError, match="no name in GGUF"):
        split_name(split(r"\w+"))
