"""Bytes a device of a training step, from shapes and shardings: no compiler, no weights.

What lies on a device throughout is counted leaf by leaf with the shardings that the run uses.
What lives only within the step is taken from JAX's own account of what the backward pass keeps:
the residuals of `jax.vjp`, traced on abstract values with the sizes that one device sees.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from jaxtune.core.tree import Tree, combine, flatten, map_paths, partition
from jaxtune.data.batches import empty_batch
from jaxtune.models import decoder
from jaxtune.models.config import ModelConfig
from jaxtune.objectives.logprobs import LOGITS_BYTES
from jaxtune.parallel.mesh import batch_shards
from jaxtune.parallel.rules import weight_shards
from jaxtune.peft.method import FROZEN, TRAINED, Method, labels
from jaxtune.training.compile import Layout

Shape = tuple[tuple[int, ...], Any]


@dataclasses.dataclass(frozen=True)
class Work:
    """What a step computes on.

    Attributes:
        config, method: the model; `config.remat` decides what the backward pass keeps.
        batch_size: rows of a step, over all devices.
        grad_accum: micro-batches.
        seq_len: tokens of a row.
        head_tokens: those of a row that logits are made of; None: all.
        stores_scores: whether attention writes its [T, T] scores to memory.
        logits_bytes: the most bytes of logits that the loss makes at a time on a device.
        quantized: whether frozen weights are stored in fewer bits than they are computed with.
    """

    config: ModelConfig
    method: Method
    batch_size: int
    grad_accum: int
    seq_len: int
    head_tokens: int | None = None
    stores_scores: bool = True
    logits_bytes: int = LOGITS_BYTES
    quantized: bool = False


def bytes_per_device(work: Work, layout: Layout, frozen: Tree) -> dict[str, int]:
    """Returns the bytes of one device while a step runs.

    Args:
        work: what is computed.
        layout: the run's shardings, and the shapes of its state.
        frozen: shapes of the frozen leaves.

    Returns:
        `weights` (frozen), `trainable` and `optimizer` lie there throughout; `gradients` are
        float32, twice with accumulation; `activations` is what the forward pass keeps for the
        backward one, the working set of one layer with its gathered weights, and what is trained,
        cast; `logits` those of
        a chunk with their gradient; `total` is the sum.
    """
    mesh = layout.mesh
    state = layout.shapes
    trainable = local_bytes(state.trainable)
    gradients = local_bytes(_as(state.trainable, jnp.float32))
    # XLA casts what is trained before the scan over the layers, and keeps it for the backward one.
    half = work.config.dtype != "float32"
    casts = local_bytes(_as(state.trainable.get("blocks"), work.config.dtype)) if half else 0
    parts = {
        "weights": local_bytes(frozen, layout.frozen),
        "trainable": trainable,
        "optimizer": local_bytes(state.opt_state),
        "gradients": gradients * (2 if work.grad_accum > 1 else 1),
        "activations": saved_bytes(work, mesh) + working_bytes(work, mesh) + casts,
        "logits": logits_bytes(work, mesh),
    }
    return parts | {"total": sum(parts.values())}


def local_bytes(tree: Tree, shardings: Tree | None = None) -> int:
    """Returns the bytes of one device's shards of a tree of shapes.

    Args:
        tree: ShapeDtypeStructs; they carry their shardings, or `shardings` has them.
        shardings: the same tree of NamedShardings.
    """
    leaves = jax.tree.leaves(tree)
    places = [leaf.sharding for leaf in leaves] if shardings is None else jax.tree.leaves(shardings)
    return sum(
        math.ceil(math.prod(place.shard_shape(leaf.shape)) * bits(leaf.dtype) / 8)
        for leaf, place in zip(leaves, places, strict=True)
    )


def bits(dtype: Any) -> int:
    """Returns the bits of an element in memory: small integers are packed."""
    name = jnp.dtype(dtype).name
    small = {"int4": 4, "uint4": 4, "int2": 2, "uint2": 2, "float4_e2m1fn": 4}
    return small.get(name, 8 * jnp.dtype(dtype).itemsize)


def saved_bytes(work: Work, mesh: Mesh | AbstractMesh) -> int:
    """Returns what the forward pass keeps of all layers for the backward pass."""
    layers = work.config.num_layers
    found = residuals(work, mesh, work.config.remat, layers)
    return sum(size * count for shape, size, count in found if shape[0] == layers)


def working_bytes(work: Work, mesh: Mesh | AbstractMesh) -> int:
    """Returns what one layer's backward pass works on, or what the widest table takes.

    A layer: everything that its gradient is computed from, and its weights, gathered from the
    devices that share them. The embedding and the head are gathered too, at other times.
    """
    layer, table = gathered_bytes(work, mesh)
    return max(block_bytes(work, mesh) + layer, table)


def block_bytes(work: Work, mesh: Mesh | AbstractMesh) -> int:
    """Returns what the backward pass of one layer works on, weights aside.

    All that it reads of the forward pass, and the gradients of the two widest arrays: those of gate
    and up, of which it makes all others.
    """
    one = residuals(work, mesh, "none", 1)
    # The layer's input is among what is saved.
    rows, tokens = _local_rows(work, mesh), _local_tokens(work, mesh)
    carry = rows * tokens * work.config.hidden_size * bits(work.config.dtype) // 8
    widest = max((size for _, size, _ in one), default=0)
    return sum(size * count for _, size, count in one) - carry + 2 * widest


def gathered_bytes(work: Work, mesh: Mesh | AbstractMesh) -> tuple[int, int]:
    """Returns the bytes of one layer's weights, and of the widest table, as a device computes them.

    Weights spread over `fsdp` are gathered in the compute dtype; the gradient of a trained one is
    as large until it is summed and spread again. On one device they are used where they lie, but
    for casts of what is trained and of what is quantised.
    """
    config = _local_config(work.config, mesh)
    shapes = decoder.abstract_params(dataclasses.replace(config, num_layers=1), work.method)
    kinds = flatten(labels(work.method, shapes))
    size = bits(config.dtype) // 8
    spread = weight_shards(mesh) > 1
    layer = table = 0
    for path, leaf in flatten(shapes).items():
        trained = kinds[path] == TRAINED
        in_place = config.dtype == "float32" if trained else not work.quantized
        if not spread and in_place:
            continue
        held = leaf.size * size * (1 + (SUMMED if trained and spread else 0))
        if path.startswith("blocks/"):
            layer += held
        else:
            table = max(table, held)
    return layer, table


SUMMED = 2  # a gradient before and after the sum over devices


def chunks_logits(work: Work, mesh: Mesh | AbstractMesh) -> bool:
    """Tells whether the loss makes its logits in chunks, as `objectives.logprobs` decides."""
    tokens = _local_rows(work, mesh) * _head_tokens(work, mesh)
    return work.config.lm_head and tokens * work.config.vocab_size * 4 > work.logits_bytes


def logits_bytes(work: Work, mesh: Mesh | AbstractMesh) -> int:
    """Returns the bytes of a chunk's logits on one device, with the gradient's; 0 without any."""
    tensor = mesh.shape["tensor"]
    config = work.config
    if not config.lm_head:
        return 0
    vocab = config.vocab_size // (tensor if config.vocab_size % tensor == 0 else 1)
    tokens = _local_rows(work, mesh) * _head_tokens(work, mesh)
    if not chunks_logits(work, mesh):
        return LOGITS_COPIES * tokens * vocab * 4
    return LOGITS_COPIES * work.logits_bytes * vocab // config.vocab_size


# Float32 logits, and their gradient in the compute dtype twice: transposed for the head's own.
LOGITS_COPIES = 2


def residuals(
    work: Work, mesh: Mesh | AbstractMesh, remat: str, layers: int
) -> list[tuple[tuple[int, ...], int, int]]:
    """Returns (shape, bytes, count) of the arrays that the backward pass of a micro-batch reads.

    Parameters are left out, as they are counted elsewhere. The trace has one device's rows, tokens,
    heads and widths; attention scores [T, S] are left out where no kernel stores them.
    """
    config = dataclasses.replace(
        _local_config(work.config, mesh), remat=remat, num_layers=layers, attention="xla"
    )
    rows, asked = _local_rows(work, mesh), _local_tokens(work, mesh)
    extra = _extra_keys(work.method)
    tokens = _odd_length(asked, config, work.method)
    keys = {tokens + more for more in extra}
    kept = _trace(config, work.method, tokens)
    shards = weight_shards(mesh)
    weights = {leaf.shape for leaf in jax.tree.leaves(decoder.abstract_params(config, work.method))}
    found = []
    for (shape, dtype), count in kept.items():
        size = rows * math.prod(shape) * bits(dtype) / 8
        if len(shape) > 1 and shape[-2] == tokens and shape[-1] in keys:
            if not work.stores_scores:
                continue
            size *= (asked / tokens) ** 2
        elif shape in weights:
            size /= rows * shards  # a cast copy of a weight lies as the weight does
        elif tokens in shape:
            size *= asked / tokens
        found.append((shape, int(size), count))
    return found


def _extra_keys(method: Method) -> set[int]:
    """Returns by how many a query's scores can be more than the tokens: a prefix, and a sink."""
    prefix = getattr(method, "num_tokens", 0)
    return {0, 1, prefix, prefix + 1}


@functools.cache
def _trace(config: ModelConfig, method: Method, tokens: int) -> Counter[Shape]:
    """Returns how often each (shape, dtype) is among the residuals of the decoder, of one row."""
    shapes = decoder.abstract_params(config, method)
    names = labels(method, shapes)
    shapes = map_paths(
        lambda _, leaf, name: jax.ShapeDtypeStruct(
            leaf.shape, config.compute_dtype if name == FROZEN else jnp.float32
        ),
        shapes,
        names,
    )
    batch = {
        key: jax.ShapeDtypeStruct((1, tokens), array.dtype)
        for key, array in empty_batch(1, 1, method.num_virtual).items()
    }

    def pullback(params: Tree, batch: dict[str, jax.Array]) -> Any:
        trained, rest = partition(params, names, lambda name: name == TRAINED)

        def states(trained: Tree) -> jax.Array:
            return decoder.hidden_states(config, method, combine(trained, rest), batch).states

        return jax.vjp(states, trained)[1]

    kept = Counter(
        (leaf.shape, leaf.dtype)
        for leaf in jax.tree.leaves(jax.eval_shape(pullback, shapes, batch))
    )
    return kept - Counter((leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(shapes))


def _odd_length(tokens: int, config: ModelConfig, method: Method) -> int:
    """Returns a length near `tokens` by which no other dimension can be mistaken for it."""
    sizes = {
        n for leaf in jax.tree.leaves(decoder.abstract_params(config, method)) for n in leaf.shape
    }
    length, extra = tokens, _extra_keys(method)
    while length > 1 and any(length + more in sizes for more in extra):
        length -= 1
    return length


def _local_config(config: ModelConfig, mesh: Mesh | AbstractMesh) -> ModelConfig:
    """Returns the config of the part that one device computes under tensor parallelism."""
    tensor = mesh.shape["tensor"]

    def share(count: int) -> int:
        return count // tensor if count % tensor == 0 else count

    heads, groups = share(config.num_heads), share(config.num_kv_heads)
    if heads % groups:
        groups = 1
    return dataclasses.replace(
        config,
        num_heads=heads,
        num_kv_heads=groups,
        intermediate_size=share(config.intermediate_size),
        vocab_size=share(config.vocab_size),
    )


def _local_rows(work: Work, mesh: Mesh | AbstractMesh) -> int:
    return max(1, work.batch_size // (work.grad_accum * batch_shards(mesh)))


def _local_tokens(work: Work, mesh: Mesh | AbstractMesh) -> int:
    return -(-work.seq_len // mesh.shape["sequence"])


def _head_tokens(work: Work, mesh: Mesh | AbstractMesh) -> int:
    return _local_tokens(work, mesh) if work.head_tokens is None else work.head_tokens


def _as(tree: Tree, dtype: Any) -> Tree:
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, dtype, sharding=s.sharding), tree)
