"""What training and adapters of a family are measured by; see `family_checks`.

The oracle of a gradient is torch's: of the merged model, written in the file layout and read back
by our own table, so that fused tensors and experts need no code of their own here.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.checkpoints.hf import load_params
from jaxtune.checkpoints.hf_export import save_hf
from jaxtune.checkpoints.peft_files import load_adapter, read_method, save_adapter
from jaxtune.core.tree import flatten, unflatten
from jaxtune.models.decoder import abstract_params, hidden_states, logits, param_axes
from jaxtune.parallel.mesh import make_mesh
from jaxtune.parallel.rules import shardings
from jaxtune.peft.lora import Lora
from tests.checkpoints.world import BASE, batch_of, logits_of, random_params
from tests.models.family_checks import World, error, their_logits, world

METHOD = Lora(rank=3, alpha=5.0)
ROUTED = Lora(rank=3, alpha=5.0, targets="blocks/.*")  # experts and their router too


@dataclasses.dataclass(frozen=True)
class Adapted:
    """A row's model under a random LoRA.

    Attributes:
        params: base and LoRA.
        logits: of each sample, [len, V].
        gradients: of the summed negative log-likelihood, of every parameter.
    """

    params: Any
    logits: list[np.ndarray]
    gradients: Any


@functools.cache
def adapted(name: str, method: Lora = METHOD) -> Adapted:
    """Runs our forward and backward pass, once a row."""
    w = world(name)
    own = flatten(random_params(w.config, method, seed=1))
    params = unflatten({p: leaf for p, leaf in own.items() if "/lora/" in p} | flatten(w.params))
    batch = batch_of(method, w.samples)
    ids, real = batch["input_ids"], batch["segment_ids"] == 1
    targets = real[:, 1:]

    @jax.jit
    def run(params):
        def loss(params):
            states = hidden_states(w.config, method, params, batch).states
            scores = logits(w.config, method, params, states)
            chances = jax.nn.log_softmax(scores[:, :-1])
            nll = -jnp.take_along_axis(chances, ids[:, 1:, None], axis=-1)[..., 0]
            return jnp.sum(nll * targets), scores

        return jax.value_and_grad(loss, has_aux=True)(params)

    (_, scores), gradients = run(params)
    rows = [np.asarray(one)[keep] for one, keep in zip(scores, real, strict=True)]
    return Adapted(params, rows, gradients)


def their_gradients(w: World, method: Lora, params: Any, directory: Path) -> dict[str, np.ndarray]:
    """torch's gradients {our path: array} of the base that `params` merge to."""
    import torch
    import transformers

    merged, written = directory / "merged", directory / "gradients"
    save_hf(merged, w.config, method.merge(params), dtype="float32")
    net = transformers.AutoModelForCausalLM.from_pretrained(
        merged, attn_implementation="eager", dtype="float32"
    ).eval()
    for row in w.samples:
        ids = torch.tensor([row])
        scores = net(ids, use_cache=False).logits[0, :-1]
        torch.nn.functional.cross_entropy(scores, ids[0, 1:], reduction="sum").backward()
    with torch.no_grad():
        for parameter in net.parameters():  # an expert that no token chose has none
            slope = parameter.grad
            parameter.copy_(torch.zeros_like(parameter) if slope is None else slope)
    net.save_pretrained(written)
    found = flatten(load_params(written, w.config, dtypes="float32"))
    return {path: np.asarray(leaf) for path, leaf in found.items()}


def training_error(name: str, directory: Path, method: Lora = METHOD) -> float:
    """The largest relative difference of a leaf's gradient from torch's: base and LoRA.

    Relative to the leaf's largest, or a thousandth of the model's: the bias of keys without a
    rotary embedding has a gradient of 0.
    """
    w, ours = world(name), adapted(name, method)
    theirs = their_gradients(w, method, ours.params, directory)
    flat, expected = flatten(ours.params), dict(theirs)
    for path in flat:
        if path.endswith("/lora/a"):
            stem = path.removesuffix("/lora/a")
            slope = theirs[f"{stem}/kernel"]
            a, b = (np.asarray(flat[f"{stem}/lora/{leaf}"]) for leaf in "ab")
            expected[f"{stem}/lora/a"] = method.scale * slope @ np.swapaxes(b, -1, -2)
            expected[f"{stem}/lora/b"] = method.scale * np.swapaxes(a, -1, -2) @ slope
    found = flatten(ours.gradients)
    assert found.keys() == expected.keys()
    assert any(path.endswith("/lora/a") for path in found)
    sizes = {path: np.abs(expected[path]).max() for path in found}
    least = max(sizes.values()) / 1000
    return float(
        max(
            np.abs(np.asarray(found[path]) - expected[path]).max() / max(size, least)
            for path, size in sizes.items()
        )
    )


def adapter_error(name: str, directory: Path, method: Lora = METHOD) -> float:
    """`error` of our adapter's logits from those of the real peft, which loaded our export."""
    w, ours = world(name), adapted(name, method)
    save_adapter(directory, w.config, method, ours.params, str(w.directory))
    return error(ours.logits, peft_logits(w, directory))


def peft_logits(w: World, directory: Path) -> list[np.ndarray]:
    """Logits of the real peft on each sample, with an adapter that changes them."""
    import peft
    import transformers

    net = transformers.AutoModelForCausalLM.from_pretrained(
        w.directory, attn_implementation="eager", dtype="float32"
    )
    net = peft.PeftModel.from_pretrained(net, directory).eval()
    theirs = their_logits(net, w.samples)
    assert error(theirs, w.theirs) > 1e-2, "the adapter changes nothing"
    return theirs


def saved_error(name: str, train: tuple[str, ...], directory: Path) -> float:
    """`adapter_error` of a LoRA on o_proj that also trained the parameters of `train`.

    What is written is read back as well, and is the same.
    """
    w, method = world(name), Lora(rank=2, alpha=3.0, targets=("o_proj",), train=train)
    params = flatten(random_params(w.config, method, seed=1)) | flatten(w.params)
    for path, leaf in params.items():
        if any(re.fullmatch(regex, path) for regex in train):
            params[path] = 1.3 * leaf + 0.05
    save_adapter(directory, w.config, method, unflatten(params), str(w.directory))
    again = read_method(directory, w.config)
    for path, leaf in load_adapter(directory, w.config, again).items():
        np.testing.assert_array_equal(leaf, params[path], err_msg=path)
    ours = logits_of(w.config, method, unflatten(params), w.samples)
    return error(ours, peft_logits(w, directory))


def sharded_error(name: str) -> float:
    """The largest difference of a leaf that was loaded onto 8 devices from the one loaded whole."""
    w, mesh = world(name), make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    placed = shardings(param_axes(w.config, BASE), abstract_params(w.config, BASE), mesh)
    found = load_params(w.directory, w.config, dtypes="float32", shardings=placed)
    assert any(not leaf.sharding.is_fully_replicated for leaf in flatten(found).values())
    apart = jax.tree.map(lambda a, b: np.abs(np.asarray(a) - np.asarray(b)).max(), found, w.params)
    return float(max(jax.tree.leaves(apart)))
