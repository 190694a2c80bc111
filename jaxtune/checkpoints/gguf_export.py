"""GGUF files for llama.cpp and its relatives, of merged Llama- and Qwen-type models.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; names of tensors and fields
are those of llama.cpp's convert_hf_to_gguf.py. Needs the package `gguf` (extra `gguf`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxtune.checkpoints.gguf_tokenizer import add_tokenizer
from jaxtune.checkpoints.hf_directory import replaced
from jaxtune.checkpoints.hf_export import check_leaves, config_of, gather
from jaxtune.core.errors import RequestError
from jaxtune.core.tree import Tree, flatten, unflatten
from jaxtune.data.tokenizer import Tokenizer
from jaxtune.models.config import ModelConfig
from jaxtune.models.decoder import abstract_params
from jaxtune.models.families import registry
from jaxtune.models.rope import Rope
from jaxtune.peft.method import Method

FILE = "model.gguf"
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
# What llama.cpp's graph of an architecture adds; it leaves other biases of a file aside.
BIASES = {
    "llama": ("attention_bias", "attention_out_bias", "mlp_bias"),
    "qwen2": ("attention_bias",),
    "qwen3": (),
}
# name → (GGML type, general.file_type)
DTYPES = {
    "float32": ("F32", "ALL_F32"),
    "float16": ("F16", "MOSTLY_F16"),
    "bfloat16": ("BF16", "MOSTLY_BF16"),
    "q8_0": ("Q8_0", "MOSTLY_Q8_0"),
}
NAMES = {
    "embed/embedding": "token_embd.weight",
    "final_norm/scale": "output_norm.weight",
    "lm_head/kernel": "output.weight",
    "blocks/attn_norm/scale": "blk.{}.attn_norm.weight",
    "blocks/mlp_norm/scale": "blk.{}.ffn_norm.weight",
    "blocks/attn/q_norm/scale": "blk.{}.attn_q_norm.weight",
    "blocks/attn/k_norm/scale": "blk.{}.attn_k_norm.weight",
} | {
    f"blocks/{path}/{leaf}": f"blk.{{}}.{name}.{end}"
    for path, name in (
        ("attn/q_proj", "attn_q"),
        ("attn/k_proj", "attn_k"),
        ("attn/v_proj", "attn_v"),
        ("attn/o_proj", "attn_output"),
        ("mlp/gate_proj", "ffn_gate"),
        ("mlp/up_proj", "ffn_up"),
        ("mlp/down_proj", "ffn_down"),
    )
    for leaf, end in (("kernel", "weight"), ("bias", "bias"))
}
ROPE_FACTORS = "rope_freqs.weight"


def package() -> Any:
    """Returns the module `gguf`.

    Raises:
        RequestError: it is not installed.
    """
    try:
        import gguf
    except ImportError as error:
        raise RequestError(
            "needs the package gguf: pip install 'jaxtune[gguf]'", key="format"
        ) from error
    return gguf


def check_config(config: ModelConfig) -> str:
    """Returns the GGUF architecture of a model.

    Raises:
        RequestError: llama.cpp would compute something else, by name.
    """
    if config.family not in ARCHITECTURES:
        raise RequestError(
            f"a {config.family} model cannot be written as GGUF in this version; "
            f"{', '.join(ARCHITECTURES)} can",
            key="format",
        )
    lost = registry.not_held(config)
    windows = [kind.window for kind in config.kinds if kind.window is not None]
    if any(window < config.max_position_embeddings for window in windows):
        lost.append(f"sliding_window={min(windows)}")
    architecture, rope = ARCHITECTURES[config.family], config.kinds[0].rope
    # the factors of llama3's frequencies are a tensor that only "llama" reads
    scalings = ("default", "linear", *(("llama3",) if architecture == "llama" else ()))
    if rope is None or rope.scaling not in scalings or rope.fraction != 1:
        lost.append(f"rope={rope if rope is None else rope.scaling}")
    if config.activation != "silu":  # no field says which; the three architectures mean this one
        lost.append(f"activation={config.activation}")
    biases = BIASES[architecture]
    lost += [
        f"{name}={held}"
        for name, held in (
            ("attention_bias", config.attention_bias),
            ("attention_out_bias", config.attention_out_bias),
            ("mlp_bias", config.mlp_bias),
        )
        if held and name not in biases
    ]
    if lost:
        raise RequestError(f"GGUF of {config.family!r} cannot hold {', '.join(lost)}", key="format")
    return architecture


def save_gguf(
    directory: str | os.PathLike[str],
    config: ModelConfig,
    params: Tree,
    *,
    dtype: str,
    tokenizer: Tokenizer | None = None,
    name: str = "model",
) -> ModelConfig:
    """Writes `model.gguf`; an older export is replaced at the end.

    Norms, biases and rows that a block of 32 does not divide keep float32, or float16 with q8_0.

    Args:
        directory: new, or holding an export.
        config: of the base.
        params: nested dict of the base's parameters, merged.
        dtype: "float32", "float16", "bfloat16" or "q8_0", of the matrices.
        tokenizer: its vocabulary, merges, special tokens and chat template are written too.
        name: for `general.name`.

    Returns:
        The ModelConfig of what was written.

    Raises:
        RequestError: the package is missing, llama.cpp would compute something else, or the
            tokenizer is of a kind that GGUF cannot name.
    """
    gguf = package()
    if dtype not in DTYPES:
        raise RequestError(f"{dtype!r} is none of {', '.join(DTYPES)}", key="dtype")
    config = config_of(config, params)
    architecture = check_config(config)
    flat = flatten(params)
    check_leaves(flat, shapes_of(config))
    kind, file_type = DTYPES[dtype]
    with replaced(directory) as aside:
        writer = gguf.GGUFWriter(aside / FILE, architecture)
        writer.add_name(name)
        writer.add_file_type(gguf.LlamaFileType[file_type])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        add_shape(writer, config)
        if tokenizer is not None:
            add_tokenizer(writer, tokenizer, config.vocab_size)
        for tensor_name, shape in tensor_shapes(config, flat).items():
            held = stored_type(kind, shape)
            size = gguf.quants.quant_shape_to_byte_shape(shape, held)
            writer.add_tensor_info(
                tensor_name, size, np.dtype(np.uint8), int(np.prod(size)), raw_dtype=held
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for _, tensor in tensors_of(config, flat):
            quantised = gguf.quants.quantize(tensor, stored_type(kind, tensor.shape))
            writer.write_tensor_data(np.ascontiguousarray(quantised).view(np.uint8))
        writer.close()
    return config


def add_shape(writer: Any, config: ModelConfig) -> None:
    """Writes the fields that decide the model's shape and what it computes."""
    gguf, rope = package(), config.kinds[0].rope
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(rope.theta)
    if rope.scaling == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope.factor)


def stored_type(kind: str, shape: tuple[int, ...]) -> Any:
    """Returns the GGML type of a tensor: vectors are float32, odd rows of q8_0 are float16."""
    gguf = package()
    if len(shape) == 1:
        return gguf.GGMLQuantizationType.F32
    if kind == "Q8_0" and shape[-1] % 32:
        return gguf.GGMLQuantizationType.F16
    return gguf.GGMLQuantizationType[kind]


def shapes_of(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Returns {path: shape} of the base's parameters."""
    return {path: leaf.shape for path, leaf in flatten(abstract_params(config, Method())).items()}


def rope_factors(rope: Rope, head_dim: int) -> np.ndarray | None:
    """Returns by what llama.cpp divides each frequency, float32 [H / 2]; None for the plain ones.

    A linear scaling is a field of its own.
    """
    if rope.scaling != "llama3":
        return None
    plain = Rope(theta=rope.theta).frequencies(head_dim)
    return (plain / rope.frequencies(head_dim)).astype(np.float32)


def tensor_shapes(config: ModelConfig, flat: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Returns {tensor name: shape}, in the order of `tensors_of`."""
    result: dict[str, tuple[int, ...]] = {}
    if config.kinds[0].rope.scaling == "llama3":
        result[ROPE_FACTORS] = (config.head_dim // 2,)
    for path, name, _ in places(config):
        one = shapes_of(config)[path]
        one = one[1:] if "{}" in NAMES[path] else one
        result[name] = one[::-1] if path.endswith("kernel") else one
    return result


def places(config: ModelConfig) -> Iterator[tuple[str, str, int | None]]:
    """Yields (path, tensor name, layer or None), layer by layer."""
    paths = list(shapes_of(config))
    for path in paths:
        if "{}" not in NAMES[path]:
            yield path, NAMES[path], None
    for layer in range(config.num_layers):
        for path in paths:
            if "{}" in NAMES[path]:
                yield path, NAMES[path].format(layer), layer


def tensors_of(config: ModelConfig, flat: dict[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (tensor name, float32 array as GGUF has it); absent biases are zeros."""
    factors = rope_factors(config.kinds[0].rope, config.head_dim)
    if factors is not None:
        yield ROPE_FACTORS, factors
    shapes = shapes_of(config)
    for path, name, layer in places(config):
        if path in flat:
            one = gather(flat[path], () if layer is None else (layer,)).astype(np.float32)
        else:
            one = np.zeros(shapes[path][1:], np.float32)
        one = one.T if path.endswith("kernel") else one
        yield name, turned(one, config, path)


def turned(tensor: np.ndarray, config: ModelConfig, path: str, back: bool = False) -> np.ndarray:
    """Returns a tensor with the rows of q and k in the order of its architecture.

    llama.cpp's "llama" turns neighbouring pairs where Hugging Face turns halves; its other
    architectures turn halves too.
    """
    heads = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads}.get(path.split("/")[-2])
    if heads is None or ARCHITECTURES[config.family] != "llama":
        return tensor
    sides = (-1, 2) if back else (2, -1)
    split = tensor.reshape(heads, *sides, *tensor.shape[1:])
    return np.ascontiguousarray(split.swapaxes(1, 2)).reshape(tensor.shape)


def load_gguf(directory: str | os.PathLike[str], config: ModelConfig) -> Tree:
    """Returns the parameters in `model.gguf`, float32 jax arrays; the inverse of `save_gguf`.

    Args:
        directory: where `save_gguf` wrote.
        config: what it gave back.

    Raises:
        RequestError: a tensor is missing, left over or misshapen.
    """
    gguf = package()
    file = Path(directory) / FILE
    held = {t.name: t for t in gguf.GGUFReader(file).tensors}
    wanted = {name for _, name, _ in places(config)}
    stray = (held.keys() ^ wanted) - {ROPE_FACTORS}
    if stray:
        raise RequestError(f"tensor {min(stray)!r} is missing or left over", where=file)
    shapes = shapes_of(config)
    leaves = {path: np.empty(shape, np.float32) for path, shape in shapes.items()}
    for path, name, layer in places(config):
        tensor = held[name]
        whole = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        whole = whole.reshape(tuple(int(n) for n in tensor.shape[::-1]))
        whole = turned(whole, config, path, back=True)
        leaves[path][() if layer is None else layer] = whole.T if path.endswith("kernel") else whole
    return unflatten({path: jax.numpy.asarray(leaf) for path, leaf in leaves.items()})
