"""Hugging Face PEFT adapter directories, in and out."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxtune.checkpoints import peft_config, peft_lora, peft_lora_write
from jaxtune.checkpoints.hf_directory import replaced
from jaxtune.checkpoints.hf_export import gather, tensors_of, write_json
from jaxtune.checkpoints.hf_tensors import read_json
from jaxtune.checkpoints.peft_check import base_copies, check_leaves, check_tensors
from jaxtune.checkpoints.peft_modules import (
    EMBEDDING,
    PREFIX,
    base_rows,
    base_shapes,
    into_leaf,
    module_of,
    saved_rows,
    tied_pair,
    within,
)
from jaxtune.checkpoints.peft_vectors import (
    PROMPT,
    check_windows,
    ia3_leaves,
    ia3_shapes,
    ia3_tensors,
    prefix_leaves,
    prefix_table,
    prefix_width,
    prompt_scale,
)
from jaxtune.checkpoints.safetensors import TensorFile, TensorWriter, open_tensors
from jaxtune.core.errors import RequestError
from jaxtune.core.tree import Tree, flatten
from jaxtune.models.config import ModelConfig
from jaxtune.models.decoder import abstract_params
from jaxtune.peft.ia3 import Ia3
from jaxtune.peft.lora import Lora
from jaxtune.peft.method import Method
from jaxtune.peft.prefix import Prefix
from jaxtune.peft.prompt import Prompt

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def open_adapter(directory: str | os.PathLike[str]) -> tuple[dict[str, Any], TensorFile]:
    """Returns (adapter_config.json as parsed, the open weights) of a PEFT directory.

    Raises:
        RequestError: a file is missing or damaged, or the weights are a pickle.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise RequestError("no such adapter directory", where=directory)
    if not (directory / CONFIG).is_file():
        hint = ""
        if (directory / "checkpoints").is_dir():
            hint = "; it is a run: name it as the model, or export its adapter with --format=peft"
        raise RequestError(f"the directory holds no {CONFIG}{hint}", where=directory)
    if not (directory / WEIGHTS).is_file():
        hint = ""
        if (directory / "adapter_model.bin").is_file():
            hint = "; adapter_model.bin is a pickle, which is never loaded: save it as safetensors"
        raise RequestError(f"the directory holds no {WEIGHTS}{hint}", where=directory)
    return read_json(directory / CONFIG), open_tensors(directory / WEIGHTS)


def read_method(
    directory: str | os.PathLike[str], config: ModelConfig, *, to_train: bool = False
) -> Method:
    """Returns the Method of a PEFT directory: Lora, Ia3, Prompt or Prefix.

    An adapter that PEFT started by PiSSA and saved unconverted is a Lora of variant "pissa".
    Modules that PEFT saved whole are parameters of the base that the method trains.

    Args:
        directory: holds adapter_config.json and adapter_model.safetensors.
        config: of the base.
        to_train: refuse what only computes as in PEFT, but would not train so.

    Raises:
        RequestError: a file is missing or damaged, or a setting that this version does not have.
    """
    fields, _ = open_adapter(directory)
    method = peft_config.method_of(fields, config, Path(directory) / CONFIG, to_train)
    if isinstance(method, Prefix):
        check_windows(config, Path(directory) / CONFIG)
    return method


def is_scorer(directory: str | os.PathLike[str]) -> bool:
    """Tells whether an adapter is that of a classifier, with a score head of its own."""
    return open_adapter(directory)[0].get("task_type") == peft_config.CLASSIFIER


def needs_own_head(directory: str | os.PathLike[str], config: ModelConfig) -> bool:
    """Tells whether an adapter wants a tied model's head to be untied from its embedding."""
    return peft_config.needs_own_head(open_adapter(directory)[0], config)


def load_adapter(
    directory: str | os.PathLike[str],
    config: ModelConfig,
    method: Method,
    base: Mapping[str, Any] | None = None,
) -> dict[str, np.ndarray]:
    """Returns {path: float32 array} of what a PEFT directory adds to the base, or replaces in it.

    PiSSA's fixed start A0, B0 is not in the file: `method.start` makes it from the base, and what
    is returned here then replaces A and B.

    Args:
        directory: holds adapter_model.safetensors.
        config: of the base.
        method: what `read_method` gave for it, or one with the same leaves.
        base: {path: leaf} of the base; without it a file that repeats a base weight is refused.

    Raises:
        RequestError: a tensor is missing, superfluous, misshapen or no float, by name; a copy of a
            base weight that is not the base's.
    """
    fields, file = open_adapter(directory)
    where = Path(directory) / CONFIG
    wanted: dict[str, tuple[int, ...]] = {}
    saved: dict[str, Any] = {}
    if isinstance(method, Lora):
        scope = peft_lora.scope_of(fields, config, where)
        wanted = peft_lora.shapes_of(method, scope)
    elif isinstance(method, Ia3):
        wanted = ia3_shapes(fields, config, where)
    elif isinstance(method, Prompt):
        wanted = {PROMPT: (method.num_tokens, config.hidden_size)}
    else:
        wanted = {PROMPT: (method.num_tokens, prefix_width(config))}
    if isinstance(method, Lora | Ia3):
        saved = saved_rows(peft_config.saved_names(fields, where), config, where)
        for row, shape in saved.values():
            wanted |= {PREFIX + name: row.tensor_shape(shape) for name in row.names(shape)}
    copies = base_copies(file, wanted, config, base or {})
    check_tensors(file, wanted, method, copies, fields.get("base_model_name_or_path"))

    def read(name: str) -> np.ndarray:
        return file.read(name).astype(np.float32)

    if isinstance(method, Lora):
        leaves = peft_lora.read_leaves(method, scope, read)
    elif isinstance(method, Ia3):
        leaves = ia3_leaves(config, method, wanted, read)
    elif isinstance(method, Prompt):
        leaves = {"prompt/embedding": read(PROMPT) / np.float32(prompt_scale(config))}
    else:
        leaves = prefix_leaves(config, read(PROMPT))
    check_leaves(config, method, leaves)
    for path, (row, shape) in saved.items():
        leaves[path] = into_leaf(row, [read(PREFIX + name) for name in row.names(shape)], shape)
    return leaves


# -- out ------------------------------------------------------------------------------------------


def save_adapter(
    directory: str | os.PathLike[str],
    config: ModelConfig,
    method: Method,
    params: Tree,
    base_name: str,
) -> None:
    """Writes a PEFT directory that `peft.PeftModel.from_pretrained` and `load_adapter` read.

    PiSSA becomes a LoRA of twice the rank, A B - A0 B0 = [A, A0] [B; -B0], on the base as it is.
    Base parameters that `peft.train` names are saved whole. With several hosts all must call it,
    and the first writes.

    Args:
        directory: new, or holding an export, which is replaced at the end.
        config: of the base.
        method: the method of the run.
        params: nested dict with at least the method's own leaves and the trained ones.
        base_name: path or name of the base model, for `base_model_name_or_path`.

    Raises:
        RequestError: PEFT has no such method, or cannot hold what was trained beside it.
    """
    refuse_unsavable(method, config)
    if isinstance(method, Prefix):
        check_windows(config)
    flat = flatten(params)
    base = base_shapes(config)
    own = [path for path in flatten(abstract_params(config, method)) if path not in base]
    train = peft_config.labelled(method, config)
    if not own:
        raise RequestError(
            f"method {method.name!r} adds no parameters to this model"
            + (f"; its targets are {method.targets!r}" if hasattr(method, "targets") else "")
        )
    absent = [path for path in (*own, *train) if path not in flat]
    if absent:
        raise RequestError(f"parameter {absent[0]!r} is missing")
    if isinstance(method, Lora):
        peft_config.refuse_overlap(method, config)
        tensors, fields = peft_lora_write.write_tensors(method, config, flat)
    elif isinstance(method, Ia3):
        peft_config.refuse_overlap(method, config)
        tensors, fields = ia3_tensors(config, flat), peft_config.ia3_fields(config, flat)
    else:
        fields = peft_config.virtual_fields(method, config)
        prompt = isinstance(method, Prompt)
        table = gather(flat["prompt/embedding"]) if prompt else prefix_table(flat)
        scale = np.float32(prompt_scale(config) if prompt else 1.0)
        tensors = {PROMPT: table.astype(np.float32) * scale}
    tensors |= saved_tensors(config, train, flat)
    fields = {
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "modules_to_save": peft_config.modules_to_save(config, train),
        "revision": None,
        "task_type": peft_config.task_of(config),
    } | fields
    if jax.process_index() != 0:
        return
    with replaced(directory) as aside:
        shapes = {name: (np.dtype(np.float32), t.shape) for name, t in tensors.items()}
        with TensorWriter(aside / WEIGHTS, shapes) as writer:
            for name, tensor in tensors.items():
                writer.write(name, tensor)
        write_json(aside / CONFIG, fields)


def saved_tensors(
    config: ModelConfig, train: list[str], flat: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """Returns the tensors of the modules that hold trained base parameters, whole.

    A module's own parameter (gpt-oss's sinks) takes the modules inside it along.

    Raises:
        RequestError: a parameter beside a trained one, in the same module, is missing.
    """
    rows, shapes = base_rows(config), base_shapes(config)
    modules = {module_of(rows[path].name) for path in train}
    chosen = {
        path: row
        for path, row in rows.items()
        if any(within(module_of(row.name), module) for module in modules)
    }
    absent = [path for path in chosen if path not in flat]
    if absent:
        raise RequestError(f"parameter {absent[0]!r} is missing")
    tensors = {
        PREFIX + name: np.asarray(tensor, np.float32)
        for name, tensor in tensors_of(chosen, shapes, flat)
    }
    if config.tie_embeddings and EMBEDDING in chosen:
        embedding, head = (f"{PREFIX}{name}.weight" for name in tied_pair(config))
        tensors[head] = tensors[embedding]
    return tensors


def refuse_unsavable(method: Method, config: ModelConfig) -> None:
    """Refuses methods that PEFT's files cannot hold, saying what to do instead."""
    instead = {
        "full": "it changed the base's own weights; export format 'hf'",
        "bitfit": "export format 'hf' merges the biases",
        "adapter": "bottleneck adapters cannot be merged either; export format 'jaxtune'",
    }
    if method.name in instead:
        raise RequestError(
            f"peft cannot hold method {method.name!r}: {instead[method.name]}", key="format"
        )
    if method.new_rows is not None:
        raise RequestError(
            "peft cannot hold the rows of new tokens without the base's table; export format 'hf'",
            key="format",
        )
    if not isinstance(method, Lora | Ia3 | Prompt | Prefix):
        raise RequestError(f"peft cannot hold method {method.name!r}", key="format")
    if config.score_head and isinstance(method, Prompt | Prefix):
        raise RequestError(
            f"a peft {method.name} cannot hold a reward model: its classes read the score at "
            "another token behind virtual ones; export format 'jaxtune'",
            key="format",
        )
    if method.train and isinstance(method, Prompt | Prefix):
        raise RequestError(
            f"a peft {method.name} cannot hold the base parameters trained by peft.train; export "
            "format 'jaxtune'",
            key="format",
        )
