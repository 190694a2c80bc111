"""A small model under every method, batches laid out by hand, and a training step for them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxtune.core.quantize import quantize
from jaxtune.core.tree import Tree, flatten, map_paths
from jaxtune.models.config import ModelConfig
from jaxtune.optim.schedules import make_schedule
from jaxtune.optim.transform import OptimSpec, make_transform
from jaxtune.parallel.batches import global_batch
from jaxtune.parallel.mesh import batch_shards, make_mesh
from jaxtune.peft.adapter import Adapter
from jaxtune.peft.bitfit import BitFit
from jaxtune.peft.full import Full
from jaxtune.peft.ia3 import Ia3
from jaxtune.peft.lora import Lora
from jaxtune.peft.method import Method
from jaxtune.peft.prefix import Prefix
from jaxtune.peft.prompt import Prompt
from jaxtune.recipes.assemble import Parts, plan_parts
from jaxtune.recipes.sft import sft_loss
from jaxtune.training.compile import Layout, fresh_state, jit_step, make_layout
from jaxtune.training.state import TrainState
from jaxtune.training.step import make_train_step, summed_gradients
from tests.checkpoints.world import random_params

CONFIG = ModelConfig(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_position_embeddings=64,
    dtype="float32",
)
METHODS: dict[str, Method] = {
    "full": Full(),
    "lora": Lora(rank=3),
    "rslora": Lora(rank=3, variant="rslora"),
    "dora": Lora(rank=3, variant="dora"),
    "pissa": Lora(rank=3, variant="pissa"),
    "houlsby": Adapter(bottleneck=4, placement="houlsby"),
    "pfeiffer": Adapter(bottleneck=4, placement="pfeiffer"),
    "parallel": Adapter(bottleneck=4, placement="parallel", activation="relu"),
    "prompt": Prompt(num_tokens=3),
    "prefix": Prefix(num_tokens=3),
    "ia3": Ia3(),
    "bitfit": BitFit(),
}
# rslora is lora by another factor, pfeiffer houlsby at one place of two: where each method costs a
# compilation of its own they are left out.
DISTINCT = [name for name in METHODS if name not in ("rslora", "pfeiffer", "parallel")]
ROWS, WIDTH = 8, 48
Example = tuple[np.ndarray, np.ndarray]


def examples(lengths: Sequence[int], seed: int = 0, vocab: int = 97) -> list[Example]:
    """(ids int32 [n], mask float32 [n]) of each length; about half of the tokens are targets."""
    rng = np.random.default_rng(seed)
    found = []
    for n in lengths:
        mask = (rng.random(n) < 0.5).astype(np.float32)
        mask[0], mask[-1] = 0.0, 1.0
        found.append((rng.integers(1, vocab, n).astype(np.int32), mask))
    return found


def batch_of(
    method: Method, rows: Sequence[Sequence[Example]], width: int = WIDTH
) -> dict[str, Any]:
    """The batch [ROWS, width] with these examples in each row, written out token by token.

    All batches have one shape, so that a function is compiled once; further rows are padding.
    """
    shape, lead = (ROWS, width), method.num_virtual
    batch = {
        "input_ids": np.zeros(shape, np.int32),
        "loss_mask": np.zeros(shape, np.float32),
        "segment_ids": np.zeros(shape, np.int32),
        "positions": np.zeros(shape, np.int32),
    }
    if lead:
        batch["virtual"] = np.full(shape, -1, np.int32)
    for r, row in enumerate(rows):
        at = 0
        for s, (ids, mask) in enumerate(row):
            for i in range(lead + len(ids)):
                batch["segment_ids"][r, at] = s + 1
                batch["positions"][r, at] = i
                if i < lead:
                    batch["virtual"][r, at] = i
                else:
                    batch["input_ids"][r, at] = ids[i - lead]
                    batch["loss_mask"][r, at] = mask[i - lead]
                at += 1
    return batch


def one_device() -> Mesh:
    return make_mesh({})


@functools.cache
def compiled_gradients(method: Method, config: ModelConfig, mesh: Mesh, count: int):
    """The jitted (trainable, frozen, batch) → (loss, metrics, gradients), compiled once a suite."""
    loss = sft_loss(config, method, batch_shards(mesh))
    key = jax.random.key(0)
    return jax.jit(lambda t, f, batch: plain(summed_gradients(loss, t, f, batch, key, count)))


def plain(found):
    """What `summed_gradients` gave, with the only term of the loss in place of all by name."""
    losses, *rest = found
    (loss,) = losses.values()
    return loss, *rest


@dataclasses.dataclass(frozen=True)
class Small:
    """A method's model on a mesh; `params` are random, nothing at the method's identity."""

    method: Method
    parts: Parts
    params: Tree
    mesh: Mesh

    @property
    def loss(self):
        """The objective, as a run has it."""
        return sft_loss(self.parts.config, self.method, batch_shards(self.mesh))

    def gradients(self, batch: dict[str, Any], count: int = 1):
        """(loss sum, weight, {path: gradient}) over `count` micro-batches, undivided."""
        trainable, frozen = self.parts.split(self.params)
        run = compiled_gradients(self.method, self.parts.config, self.mesh, count)
        with jax.set_mesh(self.mesh):
            loss, _, grads = run(trainable, frozen, global_batch(batch, self.mesh))
        flat = {p: np.asarray(g) for p, g in flatten(grads).items() if g is not None}
        return float(loss.sum), float(loss.weight), flat


def small(
    method: Method | str, config: ModelConfig = CONFIG, mesh: Mesh | None = None, seed: int = 0
) -> Small:
    """Returns the model of a method, the same numbers on every mesh.

    Weights are half as large as usual: sharp attention would magnify float32 rounding. With
    `config.quantize` they are the same ones, quantised.
    """
    method = METHODS[method] if isinstance(method, str) else method
    mesh = one_device() if mesh is None else mesh
    parts = plan_parts(config, method, mesh)
    drawn = {
        path: leaf if path.endswith("scale") else 0.5 * leaf
        for path, leaf in flatten(random_params(config.unquantized, method, seed)).items()
    }
    shapes, places = flatten(parts.shapes), flatten(parts.shardings)
    for path in [path for path in drawn if path not in shapes]:
        leaves = quantize(drawn.pop(path), config.quantize)
        drawn |= {f"{path}/{name}": leaf for name, leaf in leaves.items()}
    params = map_paths(
        lambda path, _: jax.device_put(drawn[path].astype(shapes[path].dtype), places[path]),
        parts.shapes,
    )
    return Small(method, parts, params, mesh)


@dataclasses.dataclass
class Training:
    """A state that steps; `frozen` stays."""

    model: Small
    layout: Layout
    state: TrainState
    frozen: Tree
    step: Any

    def run(self, batches: Sequence[dict[str, Any]]) -> list[dict[str, float]]:
        """Trains on each batch and returns the metrics of each step."""
        rows = []
        with jax.set_mesh(self.model.mesh):
            for batch in batches:
                placed = global_batch(batch, self.model.mesh)
                self.state, report = self.step(self.state, self.frozen, placed)
                rows.append({name: float(value) for name, value in report.items()})
        return rows


def training(
    model: Small, spec: OptimSpec | None = None, lr: float = 1e-2, grad_accum: int = 1
) -> Training:
    """Returns a Training at step 0, with its own copy of the trained leaves."""
    spec = OptimSpec(weight_decay=0.1) if spec is None else spec
    parts = model.parts
    schedule = make_schedule("constant", lr, 100)
    trained, held = parts.split(parts.shapes)
    scales = model.method.learning_rate_scales()
    tx = make_transform(spec, parts.labels, trained, schedule, scales)
    layout = make_layout(trained, held, parts.shardings, tx, model.mesh)
    step = jit_step(make_train_step(model.loss, tx, schedule, grad_accum), layout)
    trainable, frozen = parts.split(model.params)
    with jax.set_mesh(model.mesh):
        state = fresh_state(jax.tree.map(jnp.copy, trainable), tx, 0, layout)
    return Training(model, layout, state, frozen, step)


def assert_same_gradients(left, right, tolerance: float = 1e-6) -> None:
    """Compares two results of `Small.gradients`, relative to the largest element of each leaf.

    Elements that nearly cancel carry the rounding of what they are made of, so the largest
    element of a leaf sets its scale.
    """
    np.testing.assert_allclose(left[0], right[0], rtol=tolerance)
    assert left[1] == right[1]
    assert left[2].keys() == right[2].keys()
    for path, a in left[2].items():
        b = right[2][path]
        scale = max(np.abs(a).max(), np.abs(b).max())
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * scale, err_msg=path)
