"""What a family is measured by: tiny random checkpoints written by transformers, run by both.

Each function returns the measured value; `test_families_live.py` holds them to the bounds and
`docs/write_families.py` writes them down. torch and transformers are imported where needed.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from jaxtune.checkpoints.hf import load_params, read_config
from jaxtune.checkpoints.hf_export import save_hf
from jaxtune.generate import engine
from jaxtune.models.config import ModelConfig
from tests.checkpoints.world import BASE, logits_of, probe
from tests.models.families import LENGTHS, ROWS

NEW_TOKENS = 20


@dataclasses.dataclass(frozen=True)
class World:
    """A checkpoint of transformers', in its memory and in ours.

    Attributes:
        directory: config.json and model.safetensors, as `save_pretrained` writes them.
        net: the transformers model, float32, in evaluation mode.
        config, params: jaxtune's, float32.
        samples: ragged rows of token ids.
        theirs: transformers' logits of each sample, run alone, [len, V].
    """

    directory: Path
    net: Any
    config: ModelConfig
    params: Any
    samples: list[list[int]]
    theirs: list[np.ndarray]


@functools.cache
def _root() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="jaxtune-families-")


@functools.cache
def world(name: str) -> World:
    """Writes the checkpoint of a row and loads it."""
    import torch
    import transformers

    torch.set_num_threads(1)  # the nets are tiny
    transformers.utils.logging.set_verbosity(transformers.utils.logging.CRITICAL)
    transformers.utils.logging.disable_progress_bar()
    directory = Path(_root().name) / name.replace(" ", "_")
    source = transformers.AutoConfig.for_model(**copy.deepcopy(ROWS[name]))
    net = transformers.AutoModelForCausalLM.from_config(source, attn_implementation="eager").eval()
    randomise(net)
    net.save_pretrained(directory)
    config, params = load(directory)
    samples = probe(config, LENGTHS)
    return World(directory, net, config, params, samples, their_logits(net, samples))


def randomise(net: Any, seed: int = 0) -> None:
    """Gives every parameter values that matter: no bias, norm, sink or router stays trivial."""
    import torch

    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.ndim == 1:  # about its mean: 1 for most norms, 0 for biases
                parameter.copy_(parameter.mean() + 0.3 * torch.randn_like(parameter))
            else:
                spread = 1.5 * min(parameter.shape[-2:]) ** -0.5
                parameter.copy_(torch.randn_like(parameter) * spread)


def load(directory: Path, dtype: str = "float32") -> tuple[ModelConfig, Any]:
    """jaxtune's config and parameters of a directory."""
    config = dataclasses.replace(read_config(directory)[0], dtype=dtype)
    return config, load_params(directory, config, dtypes=dtype)


def their_logits(net: Any, samples: list[list[int]]) -> list[np.ndarray]:
    """Logits [len, V] of each sample, run alone and without padding."""
    import torch

    def run(row: list[int]) -> np.ndarray:
        # one token lets the frequencies of "dynamic" forget the length of an earlier sample
        net(torch.tensor([row[:1]]), use_cache=False)
        return net(torch.tensor([row]), use_cache=False).logits[0].numpy()

    with torch.no_grad():
        return [run(row) for row in samples]


def error(ours: list[np.ndarray], theirs: list[np.ndarray]) -> float:
    """The largest difference, relative to the largest of their logits."""
    scale = max(np.abs(row).max() for row in theirs)
    pairs = zip(ours, theirs, strict=True)
    return float(max(np.abs(a - b).max() for a, b in pairs) / scale)


def logits_error(w: World, side: str = "right") -> float:
    """`error` of our logits, all samples in one batch padded on `side`."""
    return error(logits_of(w.config, BASE, w.params, w.samples, side), w.theirs)


def greedy(w: World, prompts: list[list[int]]) -> tuple[list[list[int]], list[list[int]]]:
    """20 greedy tokens behind each prompt: ours, as one batch through the cache, and theirs.

    Where the angles follow the length, theirs are computed without a cache: transformers keeps keys
    as they were turned for a shorter text.
    """
    import torch

    ropes = [kind.rope for kind in w.config.kinds if kind.rope is not None]
    cached = not any(rope.follows_length for rope in ropes)
    ours = engine.generate(w.config, BASE, w.params, prompts, max_new_tokens=NEW_TOKENS)
    theirs = []
    for prompt in prompts:
        with torch.no_grad():
            whole = w.net.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                max_new_tokens=NEW_TOKENS,
                do_sample=False,
                use_cache=cached,
                pad_token_id=0,
            )
        theirs.append(whole[0, len(prompt) :].tolist())
    return [list(map(int, row)) for row in ours], theirs


def tensors(directory: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """{name: (dtype, shape, bytes)} of every tensor in a directory's safetensors."""
    import torch

    found = {}
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - not a mapping
                t = opened.get_tensor(name)
                raw = t.contiguous().view(torch.uint8).numpy().tobytes()
                found[name] = (str(t.dtype), tuple(t.shape), raw)
    return found


def exported(w: World, directory: Path) -> tuple[dict, dict, float]:
    """Our export of what was imported: its tensors, theirs, and `error` of it in transformers."""
    import transformers

    raw = json.loads((w.directory / "config.json").read_text())
    save_hf(directory, w.config, w.params, dtype="float32", raw=raw)
    net = transformers.AutoModelForCausalLM.from_pretrained(
        directory, attn_implementation="eager", dtype="float32"
    ).eval()
    again = error(their_logits(net, w.samples), w.theirs)
    return tensors(directory), tensors(w.directory), again


def exported_bf16(w: World, directory: Path) -> tuple[dict, dict]:
    """Tensors of our export of transformers' bfloat16 checkpoint, and that checkpoint's."""
    import torch

    source, written = directory / "source", directory / "written"
    half = copy.deepcopy(w.net).to(torch.bfloat16)
    half.save_pretrained(source)
    config, params = load(source, "bfloat16")
    save_hf(written, config, params, dtype="bfloat16")
    return tensors(written), tensors(source)


# -- every field of config.json -------------------------------------------------------------------

ACTIVATIONS = ("hidden_act", "hidden_activation", "activation_function")
# Names of the class and of the files' dtype.
IDENTITY = ("architectures", "model_type", "transformers_version", "dtype", "torch_dtype")


def perturbations(raw: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields (dotted field, the config with another value there)."""

    def walk(value: Any, path: tuple[str | int, ...]) -> Iterator[tuple[tuple, Any]]:
        if isinstance(value, dict):
            for key, one in value.items():
                yield from walk(one, (*path, key))
        else:
            for other in others(str(path[-1]), value):
                yield path, other

    for key, value in raw.items():
        if key in IDENTITY:
            continue
        for path, other in walk(value, (key,)):
            changed = copy.deepcopy(raw)
            node = changed
            for step in path[:-1]:
                node = node[step]
            node[path[-1]] = other
            yield f"{'.'.join(map(str, path))}={other}", changed


def others(name: str, value: Any) -> list[Any]:
    """Values of about the same kind as `value`, and unlike it."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value - 1 if name.endswith(("layers", "n_layer")) else value + 1]
    if isinstance(value, float):
        return [1.5 * value] if value > 1e-3 else [0.2]
    if name in ACTIVATIONS:
        return ["relu", "tanh"]
    if name == "rope_type":
        return [kind for kind in ("default", "linear", "dynamic") if kind != value]
    if isinstance(value, str):
        return [f"{value}_x"]
    if isinstance(value, list) and value and isinstance(value[0], str):
        return [value[::-1], value[-1:] * len(value)]
    if isinstance(value, list):
        return [[2 * v for v in value]]
    return [5, 0.5, True]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came of a perturbed config.json.

    Attributes:
        theirs: transformers' logits, or the error that it raised.
        ours: our logits, or the error that we raised.
    """

    theirs: list[np.ndarray] | Exception
    ours: list[np.ndarray] | Exception


def their_net(w: World, directory: Path) -> Any:
    """transformers' model of a directory that holds the weights of `w`."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(directory)
    if config.tie_word_embeddings != w.net.config.tie_word_embeddings:  # decided by the file
        return transformers.AutoModelForCausalLM.from_pretrained(
            directory, attn_implementation="eager", dtype="float32"
        ).eval()
    net = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    net.load_state_dict(w.net.state_dict())  # a fifth of the time that reading the file takes
    return net.eval()


def perturbed(w: World, raw: dict[str, Any], directory: Path) -> Outcome:
    """Runs the row's weights under another config.json, by both, on the longest sample."""
    import jax

    directory.mkdir(parents=True)
    for file in w.directory.glob("*.safetensors"):
        (directory / file.name).symlink_to(file)
    (directory / "config.json").write_text(json.dumps(raw))
    try:
        net = their_net(w, directory)
        theirs = their_logits(net, w.samples[:1])
    except Exception as problem:  # whatever a library raises on a config that it cannot use
        theirs = problem
    try:
        config, params = load(directory)
        if config == w.config:
            ours = logits_of(w.config, BASE, w.params, w.samples)[:1]
        else:  # op by op: most configs are run once, and their operations are those of the others
            with jax.disable_jit():
                ours = logits_of(config, BASE, params, w.samples[:1])
    except Exception as problem:
        ours = problem
    return Outcome(theirs, ours)
