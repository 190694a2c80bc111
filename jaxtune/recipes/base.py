"""Where a model's weights come from: a Hugging Face directory, a run, or a preset."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from jaxtune.checkpoints import hf
from jaxtune.checkpoints.fingerprint import fingerprint_files
from jaxtune.checkpoints.quantized_load import quantized_tree
from jaxtune.core.errors import RequestError
from jaxtune.core.tree import Tree, flatten, map_paths
from jaxtune.data.tokenizer import Tokenizer, load_tokenizer
from jaxtune.data.tokenizer_files import find_tokenizer_file
from jaxtune.models.config import ModelConfig
from jaxtune.models.decoder import abstract_params, init_params, param_axes
from jaxtune.models.presets import preset, with_overrides
from jaxtune.parallel.rules import shardings
from jaxtune.peft.method import Method

BASE = Method()


@dataclasses.dataclass(frozen=True)
class Base:
    """A model to adapt.

    Attributes:
        config: its architecture.
        load: (dtype of a path, mesh, quantize="none") → its parameters, spread over the mesh.
        tokenizer: or None, where only token ids are used.
        digest: returns the fingerprint of its weights, which is computed once it is asked for: of
            a large model it takes a while, and most verbs need none.
        raw: its config.json, for exports; None without one.
        new_rows: (first id, count) of tokens that it was not trained with.
        check: raises the RequestError of `load` if the files cannot hold the weights; reads headers
            only.
        teacher: a second model that `load` reads too; see `recipes.teacher`.
    """

    config: ModelConfig
    load: Callable[..., Tree]
    tokenizer: Tokenizer | None
    digest: Callable[[], str]
    raw: dict[str, Any] | None = None
    new_rows: tuple[int, int] | None = None
    check: Callable[[], None] = lambda: None
    teacher: Base | None = None

    @property
    def fingerprint(self) -> str:
        """Of its weights, in hexadecimal."""
        return self.digest()


def overridden(base: Base, overrides: Any) -> Base:
    """Returns the base with config fields replaced; tied embeddings may be untied.

    Raises:
        RequestError: a field that decides the shape of a stored weight.
    """
    config = with_overrides(base.config, overrides)
    old = flatten(abstract_params(base.config, BASE))
    new = flatten(abstract_params(config, BASE))
    untied = new.keys() - old.keys()
    changed = [p for p, leaf in old.items() if p not in new or new[p].shape != leaf.shape]
    if changed or untied - {"lm_head/kernel"}:
        path = (changed or sorted(untied))[0]
        raise RequestError(f"the stored weights do not have this {path}", key="model.overrides")
    if not untied:
        return dataclasses.replace(base, config=config)

    def load(dtype_of: Callable[[str], Any], mesh: Mesh, quantize: str = "none") -> Tree:
        params = base.load(dtype_of, mesh, quantize)
        place = flatten(base_shardings(config, mesh))["lm_head/kernel"]
        dtype = dtype_of("lm_head/kernel")
        head = jax.jit(lambda table: table.T.astype(dtype), out_shardings=place)
        return params | {"lm_head": {"kernel": head(params["embed"]["embedding"])}}

    return dataclasses.replace(base, config=config, load=load)


def is_run(path: Path) -> bool:
    """Tells whether a directory is the workdir of a run."""
    return (path / "checkpoints").is_dir() and (path / "config.json").is_file()


def from_hf(path: Path, lm_head: bool = True) -> Base:
    """Returns the Base of a Hugging Face directory; of its weights nothing is read yet.

    Args:
        path: the directory.
        lm_head: whether a language model's head is wanted; else it is left in its file.
    """
    config, raw = hf.read_config(path)
    if not lm_head:
        config = dataclasses.replace(config, lm_head=False, tie_embeddings=False)
    tokenizer = load_tokenizer(path) if has_tokenizer(path) else None
    files = [path / "config.json", *(p for p in path.glob("*.safetensors") if p.is_file())]

    def load(dtype_of: Callable[[str], Any], mesh: Mesh, quantize: str = "none") -> Tree:
        held = dataclasses.replace(config, quantize=quantize)
        return hf.load_params(path, held, dtypes=dtype_of, shardings=base_shardings(held, mesh))

    return Base(
        config,
        load,
        tokenizer,
        functools.cache(lambda: fingerprint_files(files)),
        raw,
        check=lambda: hf.check_headers(path, config),
    )


def has_tokenizer(path: Path) -> bool:
    """Tells whether a directory holds a tokenizer."""
    return find_tokenizer_file(path) is not None or (path / "tokenizer_config.json").is_file()


def from_preset(model: Any, seed: int) -> Base:
    """Returns the Base of a preset: random weights, the same for the same seed on every mesh."""
    config = preset(model.preset)
    if model.tokenizer is not None and "vocab_size" not in model.overrides:
        tokenizer = load_tokenizer(model.tokenizer)
        config = dataclasses.replace(config, vocab_size=tokenizer.vocab_size)
    config = with_overrides(config, model.overrides)

    def load(dtype_of: Callable[[str], Any], mesh: Mesh, quantize: str = "none") -> Tree:
        held = dataclasses.replace(config, quantize=quantize)

        def draw() -> Tree:
            params = init_params(held, BASE, jax.random.key(seed))
            return map_paths(lambda path, leaf: leaf.astype(dtype_of(path)), params)

        return jax.jit(draw, out_shardings=base_shardings(held, mesh))()

    digest = hashlib.blake2b(f"{config!r} {seed}".encode(), digest_size=16)
    return Base(config, load, None, digest.hexdigest)


def base_shardings(config: ModelConfig, mesh: Mesh) -> Tree:
    """Returns the NamedSharding of each base parameter."""
    return shardings(param_axes(config, BASE), abstract_params(config, BASE), mesh)


def quantized(config: ModelConfig, params: Tree, mesh: Mesh) -> Tree:
    """Returns a base's whole parameters as `config.quantize` holds them."""
    if config.quantize == "none":
        return params
    leaves, places = flatten(abstract_params(config, BASE)), flatten(base_shardings(config, mesh))
    return quantized_tree(params, config.quantize, leaves, places)


def check_vocabulary(config: ModelConfig, tokenizer: Tokenizer | None) -> None:
    """Raises RequestError if the tokenizer has ids that the model has no row for."""
    if tokenizer is not None and tokenizer.vocab_size > config.vocab_size:
        raise RequestError(
            f"has {tokenizer.vocab_size} ids, but the model's vocabulary has {config.vocab_size}",
            key="model.tokenizer",
        )
