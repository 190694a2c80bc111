"""Tiny Llama checkpoints, PEFT adapters and token batches, the same bits on every machine.

All numbers come from `numpy.random.RandomState.random_sample`, whose stream is frozen and which
needs no transcendental function, so a golden value depends on nothing but the library that made it.
Only numpy and safetensors are needed: the files are read by jaxtune and by transformers + PEFT.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

VOCAB, HIDDEN, INTERMEDIATE, LAYERS, HEADS, KV_HEADS, CONTEXT = 97, 32, 48, 3, 4, 2, 128
RANK, ALPHA, VIRTUAL = 4, 8, 5
STEPS, BATCH, SEQ = 10, 4, 24
NEW_TOKENS = 20

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ADAPTERS = ("lora", "lora_qv", "rslora", "dora", "prompt", "prefix", "ia3")

# What is checked in logits.json: the options of the checkpoint by a name.
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
MODELS: dict[str, dict[str, Any]] = {
    "plain": {},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "head_dim": {"head_dim": 12},
    "sharded": {"shards": 3},
    "rope_parameters": {"rope_style": "parameters"},
    "rope_linear": {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    "rope_llama3": {"rope_scaling": LLAMA3_ROPE},
}

CONFIGS = Path(__file__).with_name("adapter_configs.json")


def _uniform(rng: np.random.RandomState, std: float, *shape: int, mean: float = 0.0) -> np.ndarray:
    return (mean + std * 3**0.5 * (2 * rng.random_sample(shape) - 1)).astype(np.float32)


def llama_config(**overrides: Any) -> dict[str, Any]:
    """The config.json of the tiny Llama, with `overrides` of its keys.

    `rope_style` is "legacy" (`rope_theta`, `rope_scaling`, as in nearly all published files) or
    "parameters" (`rope_parameters`, as transformers 5 writes).
    """
    style = overrides.pop("rope_style", "legacy")
    theta = overrides.pop("rope_theta", 5000.0)
    scaling = overrides.pop("rope_scaling", None)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        # None: greedy goldens are then always NEW_TOKENS long.
        "eos_token_id": None,
        "hidden_act": "silu",
        "hidden_size": HIDDEN,
        "initializer_range": 0.02,
        "intermediate_size": INTERMEDIATE,
        "max_position_embeddings": CONTEXT,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": HEADS,
        "num_hidden_layers": LAYERS,
        "num_key_value_heads": KV_HEADS,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "use_cache": True,
        "vocab_size": VOCAB,
    }
    if style == "legacy":
        config |= {"rope_theta": theta, "rope_scaling": scaling}
    elif style == "parameters":
        config["rope_parameters"] = {"rope_type": "default", "rope_theta": theta} | (scaling or {})
    else:
        raise ValueError(f"rope_style is 'legacy' or 'parameters', not {style!r}")
    unknown = set(overrides) - set(config) - {"head_dim"}
    if unknown:
        raise ValueError(f"not keys of the tiny Llama: {sorted(unknown)}")
    return config | overrides


def _linear_shapes(config: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """[out, in] of each linear layer of a block, as torch stores it."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    head_dim = config.get("head_dim", hidden // config["num_attention_heads"])
    heads, kv = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    return {
        "self_attn.q_proj": (heads, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, heads),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }


def llama_tensors(config: dict[str, Any], seed: int = 0) -> dict[str, np.ndarray]:
    """Random float32 weights for `config`, under the names of transformers' LlamaForCausalLM.

    Much larger than a fresh initialisation (logits of about unit spread, norm scales off 1), so
    that attention, rotary positions and every bias matter in the numbers.
    """
    rng = np.random.RandomState(seed)
    hidden = config["hidden_size"]
    tensors = {"model.embed_tokens.weight": _uniform(rng, 1.0, config["vocab_size"], hidden)}
    for layer in range(config["num_hidden_layers"]):
        block = f"model.layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{block}.{norm}.weight"] = _uniform(rng, 0.1, hidden, mean=1.0)
        for name, (out, inner) in _linear_shapes(config).items():
            tensors[f"{block}.{name}.weight"] = _uniform(rng, inner**-0.5, out, inner)
            if config["attention_bias" if name.startswith("self_attn") else "mlp_bias"]:
                tensors[f"{block}.{name}.bias"] = _uniform(rng, 0.2, out)
    tensors["model.norm.weight"] = _uniform(rng, 0.1, hidden, mean=1.0)
    if not config["tie_word_embeddings"]:
        tensors["lm_head.weight"] = _uniform(rng, 1.5 * hidden**-0.5, config["vocab_size"], hidden)
    return tensors


def write_llama(directory: Path, *, seed: int = 0, shards: int = 1, **overrides: Any) -> Path:
    """Writes a tiny Hugging Face Llama checkpoint (no tokenizer) and returns its directory."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    config = llama_config(**overrides)
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    tensors = llama_tensors(config, seed)
    if shards == 1:
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        return directory
    # Interleaved on purpose: one layer's tensors, even one module's, lie in different files.
    weight_map = {
        name: f"model-{i % shards + 1:05d}-of-{shards:05d}.safetensors"
        for i, name in enumerate(tensors)
    }
    for file in sorted(set(weight_map.values())):
        part = {name: tensors[name] for name, where in weight_map.items() if where == file}
        save_file(part, directory / file, metadata={"format": "pt"})
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return directory


def _targets(kind: str) -> tuple[str, ...]:
    if kind == "ia3":
        return ("k_proj", "v_proj", "down_proj")
    return ("q_proj", "v_proj") if kind == "lora_qv" else LINEAR


def adapter_config(kind: str, base: str = "") -> dict[str, Any]:
    """The adapter_config.json of `kind`, field by field as PEFT writes it (adapter_configs.json).

    rank 4, alpha 8, dropout 0; 5 virtual tokens; prefix: `token_dim` and `num_attention_heads` are
    those of the key-value heads, as PEFT stores them under grouped-query attention.
    """
    if kind not in ADAPTERS:
        raise ValueError(f"kind is one of {ADAPTERS}, not {kind!r}")
    config = json.loads(CONFIGS.read_text())[kind]
    return config | {"base_model_name_or_path": base}


def adapter_tensors(kind: str, base: Path, seed: int = 1) -> dict[str, np.ndarray]:
    """Random, nowhere trivial float32 weights of an adapter for the model in `base`, PEFT's names.

    lora_A [r, in], lora_B [out, r]; lora_magnitude_vector [out]; ia3_l [out, 1], or [1, in] where
    the layer counts as feed-forward; prompt_embeddings [P, hidden], or for prefix
    [P, layers * 2 * kv_heads * head_dim] with layer, key or value, head, channel from slow to fast.
    """
    model = json.loads((Path(base) / "config.json").read_text())
    layers, hidden = model["num_hidden_layers"], model["hidden_size"]
    rng = np.random.RandomState(seed)
    if kind == "prompt":
        return {"prompt_embeddings": _uniform(rng, 1.0, VIRTUAL, hidden)}
    shapes = _linear_shapes(model)
    if kind == "prefix":
        width = layers * 2 * shapes["self_attn.k_proj"][0]
        return {"prompt_embeddings": _uniform(rng, 1.0, VIRTUAL, width)}
    weights = load_file(Path(base) / "model.safetensors") if kind == "dora" else {}
    tensors = {}
    for layer in range(layers):
        for name, (out, inner) in shapes.items():
            if name.split(".")[-1] not in _targets(kind):
                continue
            key = f"base_model.model.model.layers.{layer}.{name}"
            if kind == "ia3":
                shape = (1, inner) if name == "mlp.down_proj" else (out, 1)
                tensors[f"{key}.ia3_l"] = _uniform(rng, 0.2, *shape, mean=1.0)
                continue
            tensors[f"{key}.lora_A.weight"] = _uniform(rng, inner**-0.5, RANK, inner)
            tensors[f"{key}.lora_B.weight"] = _uniform(rng, 0.1, out, RANK)
            if kind == "dora":
                # The row norms of the base, off by a tenth: neither the identity nor absurd.
                weight = weights[f"model.layers.{layer}.{name}.weight"].astype(np.float64)
                norm = np.sqrt((weight**2).sum(1)) * _uniform(rng, 0.1, out, mean=1.0)
                tensors[f"{key}.lora_magnitude_vector"] = norm.astype(np.float32)
    return tensors


def write_adapter(directory: Path, kind: str, base: Path, *, seed: int = 1) -> Path:
    """Writes a PEFT adapter directory of `kind` for the checkpoint in `base`; returns it."""
    directory = Path(directory)
    config = adapter_config(kind, str(base))
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    file = directory / "adapter_model.safetensors"
    save_file(adapter_tensors(kind, base, seed), file, metadata={"format": "pt"})
    return directory


def batches(
    steps: int = STEPS, batch_size: int = BATCH, max_length: int = SEQ, seed: int = 2
) -> list[list[dict[str, list[int]]]]:
    """Ragged pretokenised examples, `steps` lists of `batch_size` {input_ids, loss_mask}.

    Lengths 5..`max_length` (the first of each batch is full); the prompt, up to a third, is not
    trained, and a hole of one token inside the target shows that masks are not mere lengths. The
    tokens follow x' = 5 x + 3 mod 97 with noise, so that there is something to learn.
    """
    rng = np.random.RandomState(seed)
    result = []
    for _ in range(steps):
        examples = []
        for row in range(batch_size):
            length = max_length if row == 0 else int(rng.randint(5, max_length + 1))
            ids = [int(rng.randint(3, VOCAB))]
            while len(ids) < length:
                noisy = rng.random_sample() < 0.2
                ids.append(int(rng.randint(3, VOCAB)) if noisy else (5 * ids[-1] + 3) % VOCAB)
            prompt = int(rng.randint(1, max(2, length // 3)))
            mask = [0] * prompt + [1] * (length - prompt)
            if length > 12:
                mask[-3] = 0
            examples.append({"input_ids": ids, "loss_mask": mask})
        result.append(examples)
    return result


def probe(lengths: tuple[int, ...] = (40, 17, 29), seed: int = 3) -> list[list[int]]:
    """The fixed ragged inputs of logits.json; 40 is past the llama3 original context of 32."""
    rng = np.random.RandomState(seed)
    return [[int(x) for x in rng.randint(3, VOCAB, size=length)] for length in lengths]


def prompts() -> list[list[int]]:
    """The prompts that logits.json continues greedily, ragged."""
    return probe((40, 4, 9), seed=4)


def kept_positions(length: int) -> list[int]:
    """The positions of a row whose logits logits.json holds whole: first, middle, last."""
    return [0, length // 2, length - 1]


def pad(rows: list[list[int]], side: str) -> tuple[np.ndarray, np.ndarray]:
    """`rows` as ids and mask, both int32 [B, T], padded with 0 on `side` ("left" or "right")."""
    width = max(map(len, rows))
    ids, mask = np.zeros((2, len(rows), width), np.int32)
    for i, row in enumerate(rows):
        where = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[i, where], mask[i, where] = row, 1
    return ids, mask


def fingerprint(*parts: Any) -> str:
    """A short hash of arrays, dicts of arrays and JSON values; names what goldens were made of."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        tensors = part if isinstance(part, dict) else {"": part}
        for name in sorted(tensors):
            value = tensors[name]
            array = isinstance(value, np.ndarray)
            digest.update(f"{name}:".encode())
            digest.update(value.tobytes() if array else json.dumps(value, sort_keys=True).encode())
    return digest.hexdigest()


def write_world(directory: Path, kind: str = "full") -> tuple[Path, Path | None]:
    """Writes the plain tiny Llama and, unless `kind` is "full", its adapter: (model, adapter)."""
    model = write_llama(Path(directory) / "model")
    return model, None if kind == "full" else write_adapter(Path(directory) / kind, kind, model)


def cases(directory: Path) -> dict[str, tuple[Path, Path | None]]:
    """Writes every case of logits.json: name → (model, adapter); adapters are on "plain"."""
    directory = Path(directory)
    result: dict[str, tuple[Path, Path | None]] = {
        name: (write_llama(directory / name, **overrides), None)
        for name, overrides in MODELS.items()
    }
    plain = directory / "plain"
    for kind in ADAPTERS:
        result[kind] = plain, write_adapter(directory / "adapters" / kind, kind, plain)
    return result


def _tensors(*directories: Path | None) -> list[dict[str, np.ndarray]]:
    found = [sorted(Path(d).glob("*.safetensors")) for d in directories if d]
    return [load_file(file) for files in found for file in files]


def case_fingerprint(model: Path, adapter: Path | None) -> str:
    """The fingerprint of everything that a case of logits.json is computed from."""
    return fingerprint(probe(), prompts(), *_tensors(model, adapter))


def world_fingerprint(directory: Path, kind: str) -> str:
    """The fingerprint of everything that a trajectory of `kind` starts from."""
    return fingerprint(batches(), *_tensors(*write_world(directory, kind)))
